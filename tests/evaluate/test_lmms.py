"""Tasks of lmms-eval over local files: what is asked, and scores that are those of lmms-eval's own evaluator.

Runs where lmms-eval is installed: `make env-evaluation`, then
`.venv-evaluation/bin/python -m pytest tests/evaluate/test_lmms.py`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from unittest.mock import ANY

import pandas as pd
import pytest
import yaml

pytest.importorskip("lmms_eval", reason="make env-evaluation")

from tests.support import warm_python
from tests.support.benchmarks import BENCHMARKS, Benchmark, mme, picture, pope, write_rows
from tests.support.demo import load_json
from workflow_scripts.acquire.step import main as acquire
from workflow_scripts.config.evaluation import TaskSpec
from workflow_scripts.config.shapes import ShapesTower
from workflow_scripts.demo.models import build
from workflow_scripts.evaluate import score
from workflow_scripts.evaluate.asking import Chunk, answer, decode_picture
from workflow_scripts.evaluate.checkpoint import load_checkpoint
from workflow_scripts.evaluate.conditions import Condition
from workflow_scripts.evaluate.lmms import VERSION, questions, scores
from workflow_scripts.evaluate.lmms.chance import Chance, listed_letters
from workflow_scripts.evaluate.lmms.task import find_definition, no_network
from workflow_scripts.evaluate.questions import read_questions
from workflow_scripts.evaluate.tasks import TASKS
from workflow_scripts.io import UserError, write_json

ROOT = Path(__file__).parents[2]
BY_TASK = {item.task: item for item in BENCHMARKS}


@pytest.fixture(scope="session")
def tower(tmp_path_factory):
    """A vision tower that has learnt next to nothing: what is answered does not matter here."""
    folder = tmp_path_factory.mktemp("models") / "tower"
    build(ShapesTower(seed=1, steps=2), folder)
    return folder


def spec_of(item, **changes):
    lmms = {"task": item.task, **item.lmms, **changes.pop("lmms", {})}
    return TaskSpec.model_validate({"source": "mine", "kind": "lmms", "lmms": lmms, **changes})


def source_of(item, folder, marked=True):
    """The benchmark's files as a source, by the acquire step."""
    files = [folder / "instructions-0.parquet"]
    write_rows_of(item, files[0], marked)
    if item.pictures:
        files.append(folder / "images-0.parquet")
        write_rows(item.pictures, files[1])
    manifest = folder / "source" / "manifest.json"
    spec = {"kind": "path", "annotations": [str(path) for path in files]}
    acquire(["--name", "mine", "--spec", json.dumps(spec), "--manifest", str(manifest)])
    return manifest


def write_rows_of(item, path, marked=True):
    if "image" in item.rows[0]:
        write_rows(item.rows, path, marked)
    else:
        pd.DataFrame(item.rows).to_parquet(path)


def prepared(item, folder, marked=True, **changes):
    """(source, questions): both manifests."""
    source, manifest = source_of(item, folder, marked), folder / "questions" / "manifest.json"
    questions.prepare("q", spec_of(item, **changes).lmms, source, manifest)
    return source, manifest


def answered(item, folder, manifest, answers=None):
    """A finished run of predictions with the benchmark's answers, and the reverse as permuted ones."""
    said = answers or dict(zip(map(str, range(len(item.rows))), item.answers, strict=True))
    asked = read_questions(spec_of(item), manifest)
    backwards = [said[question.name] for question in reversed(asked)]
    rows = [
        row_of(question, condition, answer)
        for condition, given in (("normal", [said[q.name] for q in asked]), ("permuted", backwards))
        for question, answer in zip(asked, given, strict=True)
    ]
    run = folder / "predict" / "p"
    (run / "state").mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(run / "state" / "predictions.parquet")
    about = {"task": item.task, "folder": "state", "digest": "d", "run": "p", "questions": len(asked)}
    about |= {"checkpoint": {}, "interventions": {}, "source": {}, "harness": {}, "asked": {}, "pictures": 1}
    write_json(run / "manifest.json", about | {"lmms_eval": load_json(manifest)["lmms_eval"]})
    return run / "manifest.json"


def row_of(question, condition, answer):
    return {
        "question": question.name,
        "question_digest": question.digest,
        "picture": question.image,
        "stratum": question.type,
        "text": question.text,
        "right": list(question.answers),
        "choices": [],
        "condition": condition,
        "seed": 0,
        "raw": answer,
        "answer": answer,
    }


def scored(item, folder):
    """What the step `score` writes of the benchmark's answers."""
    source, manifest = prepared(item, folder)
    predictions = answered(item, folder, manifest)
    given = folder / "score" / "s" / "lmms_eval.json"
    scores.score_answers(spec_of(item), source, predictions, given)
    spec = score.ScoreSpec(task=spec_of(item, max_empty_share=1), resamples=100)
    return score.score(spec, predictions, given.with_name("manifest.json"), given)


# ---- the same numbers as lmms-eval's own evaluator ----


@pytest.fixture(scope="module")
def by_the_evaluator(tmp_path_factory):
    """What lmms-eval's evaluator says of the same answers, by task."""
    from lmms_eval.api.model import lmms
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    class Answers(lmms):
        is_simple = True

        def generate_until(self, requests):
            asked = [(request.args[4].removeprefix("local_"), request.args[3]) for request in requests]
            return [BY_TASK[task].answers[place] for task, place in asked]

        loglikelihood = generate_until_multi_round = None

    folder = tmp_path_factory.mktemp("evaluator")
    for item in BENCHMARKS:
        write_local_task(item, folder)
    found = simple_evaluate(
        model=Answers(),
        tasks=[f"local_{item.task}" for item in BENCHMARKS],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False, model_name="llava_hf"),
        bootstrap_iters=0,
        cli_args=Namespace(output_path=str(folder), process_with_media=False, limit=None),
    )
    return found["results"]


def write_local_task(item, folder):
    """The task as its authors define it, over a local file: GQA's has the pictures beside the questions."""
    from lmms_eval import tasks
    from lmms_eval.utils import load_yaml_config

    shown = {row["id"]: row["image"] for row in item.pictures}
    rows = [{**row, "image": shown[row["imageId"]]} if shown else row for row in item.rows]
    write_rows(rows, folder / f"{item.task}.parquet")
    defined = find_definition(item.task, Path(tasks.__path__[0]))
    split = load_yaml_config(str(defined))["test_split"]
    content = {
        "include": str(defined),
        "task": f"local_{item.task}",
        "dataset_path": "parquet",
        "dataset_name": None,
        "process_docs": None,
        "dataset_kwargs": {"data_files": {split: str(folder / f"{item.task}.parquet")}},
    }
    (folder / f"{item.task}.yaml").write_text(yaml.safe_dump(content))


@pytest.mark.slow
@pytest.mark.parametrize("item", BENCHMARKS, ids=lambda item: item.task)
def test_metrics_are_those_of_lmms_evals_own_evaluator(item, tmp_path, by_the_evaluator):
    ours, theirs = scored(item, tmp_path), by_the_evaluator[f"local_{item.task}"]
    metrics = ours["metrics"]["normal"]["0"]
    films = {"seed_all", "seed_video"}  # which are not asked
    named = {name.removesuffix(",none") for name in theirs if name.endswith(",none")} - films
    assert {name for name in named if "_stderr" not in name and name != "submission"} <= metrics.keys()
    for name in metrics.keys() - films:
        assert metrics[name] == pytest.approx(theirs[f"{name},none"]), name
    assert ours["lmms_eval"] == {"version": VERSION, "task": item.task, "task_digest": ANY}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "metric", "full"),
    [("pope_adv", "pope_accuracy", 1), ("mmbench_en_dev_static", "gpt_eval_score", 100)],
)
def test_accuracies_with_intervals_are_means_of_the_same_scores(tmp_path, task, metric, full):
    found = scored(BY_TASK[task], tmp_path)
    for condition in ("normal", "permuted"):
        cell = found["accuracy"][condition]["all"]
        assert full * cell["value"] == pytest.approx(found["metrics"][condition]["0"][metric])
        assert cell["low"] <= cell["value"] <= cell["high"]
    assert 0 < found["accuracy"]["normal"]["all"]["value"] < 1


# ---- what is asked ----


def test_questions_are_worded_by_the_task_and_keep_the_pictures_files(tmp_path):
    item = BY_TASK["pope_adv"]
    _, manifest = prepared(item, tmp_path)
    asked = read_questions(spec_of(item), manifest)
    assert asked[1].text == "Is there a cup 1?\nAnswer the question using a single word or phrase."
    assert [(q.name, q.type, q.answers) for q in asked[:2]] == [
        ("0", "adversarial", ("yes",)),
        ("1", "adversarial", ("no",)),
    ]
    assert asked[0].image == asked[1].image != asked[2].image
    with TASKS["lmms"].pictures(manifest, None, asked) as shown:
        assert [shown(q.image) for q in asked] == [row["image"]["bytes"] for row in item.rows]


def test_pictures_in_files_of_their_own_are_found(tmp_path):
    item = BY_TASK["gqa"]
    _, manifest = prepared(item, tmp_path)
    asked = read_questions(spec_of(item), manifest)
    with TASKS["lmms"].pictures(manifest, None, asked) as shown:
        assert [shown(q.image) for q in asked] == [item.pictures[i]["image"]["bytes"] for i in (0, 0, 1)]


def test_ocr_tokens_are_a_setting_of_the_prompt(tmp_path):
    item = BY_TASK["textvqa_val"]
    source, plain = prepared(item, tmp_path)
    with_tokens = tmp_path / "ocr" / "manifest.json"
    questions.prepare("q", spec_of(item, lmms={"prompt": {"ocr": True}}).lmms, source, with_tokens)
    texts = [read_questions(spec_of(item), path)[0].text for path in (plain, with_tokens)]
    assert "Reference OCR token: STOP, now" in texts[1] and "STOP" not in texts[0]
    assert load_json(plain)["digest"] != load_json(with_tokens)["digest"]
    with pytest.raises(UserError, match=r"textvqa_val has no setting 'ocrs'; it has: .*ocr"):
        questions.prepare("q", spec_of(item, lmms={"prompt": {"ocrs": True}}).lmms, source, with_tokens)


def test_files_that_do_not_say_which_columns_are_pictures_are_read_too(tmp_path):
    for name in ("pope_pop", "seedbench"):
        (tmp_path / name / "plain").mkdir(parents=True)
        _, marked = prepared(BY_TASK[name], tmp_path / name)
        _, plain = prepared(BY_TASK[name], tmp_path / name / "plain", marked=False)
        assert load_json(marked)["digest"] == load_json(plain)["digest"]


def test_a_picture_that_the_task_changes_is_shown_changed(tmp_path):
    """Here a palette's transparency, which the task's own conversion leaves out."""
    item = pope("pope_adv", "adversarial")
    item.rows[0]["image"] = picture(0, "P")
    _, manifest = prepared(item, tmp_path)
    asked = read_questions(spec_of(item), manifest)
    with TASKS["lmms"].pictures(manifest, None, asked[:1]) as shown:
        assert decode_picture("p", shown(asked[0].image)).size == (24, 16)


@pytest.mark.parametrize(
    ("lmms", "message"),
    [
        ({"task": "pope_advv"}, "'pope_advv' is no task of lmms-eval"),
        ({"task": "pope_full"}, "'pope_full' is no task of lmms-eval .*not a group"),
        ({"files": "Full/*.parquet"}, r"no annotation file ends as 'Full/\*\.parquet'; there are: .*instr"),
        ({"stratum": "kind"}, "pope_adv has no column 'kind'; columns: .*category"),
        ({"answer": "kind"}, "no column 'kind'"),
        ({"only": {"kind": "x"}}, "no column 'kind'"),
        ({"task": "arc_easy"}, "asks for something else than an answer in words"),
    ],
)
def test_what_can_not_be_asked_is_named(tmp_path, lmms, message):
    with pytest.raises(UserError, match=message):
        prepared(BY_TASK["pope_adv"], tmp_path, lmms=lmms)


def test_a_damaged_file_is_named(tmp_path):
    source, manifest = prepared(BY_TASK["pope_adv"], tmp_path)
    path = tmp_path / "instructions-0.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"instructions-0\.parquet: can't be read as parquet"):
        questions.prepare("q", spec_of(BY_TASK["pope_adv"]).lmms, source, manifest)


def test_a_question_about_several_pictures_is_named(tmp_path):
    with pytest.raises(UserError, match=r"seedbench, question 1: asks about 2 pictures"):
        prepared(BY_TASK["seedbench"], tmp_path, lmms={"only": {}})


# ---- scores ----


def test_a_metric_that_speaks_to_another_machine_is_refused():
    with pytest.raises(UserError, match=r"a judge .*asks another machine \(192\.0\.2\.1\) for its scores"):
        ask_a_judge()


def ask_a_judge():
    with no_network("a judge"), suppress(OSError):  # who is not answered goes on, as judges' callers do
        socket.create_connection(("192.0.2.1", 443), timeout=1)


def test_scores_outside_the_scale_and_unknown_metrics_are_named(tmp_path):
    item = BY_TASK["mmbench_en_dev_static"]
    source, manifest = prepared(item, tmp_path)
    predictions = answered(item, tmp_path, manifest)
    for change, message in (
        ({"full_score": 1}, "gpt_eval_score of mmbench_en_dev_static scores an answer 100.*lmms.full_score"),
        ({"metric": "accuracy"}, "no metric 'accuracy'; it has: gpt_eval_score, submission"),
    ):
        with pytest.raises(UserError, match=message):
            scores.score_answers(spec_of(item, lmms=change), source, predictions, tmp_path / "s" / "x.json")


def test_answers_to_another_version_of_the_task_are_refused(tmp_path):
    item = BY_TASK["pope_adv"]
    source, manifest = prepared(item, tmp_path)
    write_json(manifest, {**load_json(manifest), "lmms_eval": {"version": "0.1"}})
    predictions = answered(item, tmp_path, manifest)
    with pytest.raises(UserError, match=r"asked with .*0\.1.*ask again"):
        scores.score_answers(spec_of(item), source, predictions, tmp_path / "s" / "x.json")


# ---- what a guess would score ----

LEVELS = {
    "pope_adv": 1 / 2,
    "cv_bench_2d": 1 / 3,
    "scienceqa_img": 1 / 3,
    "mmbench_en_dev_static": 1 / 3,
    "seedbench": 1 / 4,
    "mme": 1 / 2,
    "mmvp": 1 / 2,
}


@pytest.mark.parametrize("task", LEVELS)
def test_chance_is_a_guess_among_a_questions_own_options(task, tmp_path):
    found = scored(BY_TASK[task], tmp_path)
    assert found["chance"]["all"] == pytest.approx(LEVELS[task], abs=1e-4)
    assert found["no_chance"] == ""
    assert found["guessed"]["metrics"].keys() == found["metrics"]["normal"]["0"].keys() - {"seed_video"}


def test_guesses_at_pairs_are_counted_as_the_task_counts_pairs(tmp_path):
    """MME gives a category the share of right answers and that of right pairs: a guesser's 50 + 25."""
    rows = [
        {**row, "question_id": f"{turn}/{row['question_id']}"} for turn in range(20) for row in mme().rows
    ]
    item = Benchmark("mme", rows, mme().answers * 20, {"stratum": "category"})
    guessed = scored(item, tmp_path)["guessed"]
    assert guessed["draws"] == 20
    assert guessed["metrics"]["mme_perception_score"] == pytest.approx(75, abs=5)
    assert guessed["metrics"]["mme_cognition_score"] == pytest.approx(75, abs=7)


def test_metrics_over_many_questions_need_few_draws():
    assert [Chance(dict.fromkeys(map(str, range(n)), 0.5), {}).draws for n in (4, 3000, 14_233)] == [20, 3, 1]


def test_guesses_are_the_same_each_time(tmp_path):
    item = BY_TASK["mmvp"]
    first, again = (scored(item, tmp_path / name)["guessed"] for name in "ab")
    assert first == again
    assert 0 < first["metrics"]["mmvp_pair_accuracy"] < first["metrics"]["mmvp_accuracy"]


@pytest.mark.parametrize(("task", "number"), [("gqa", 3), ("vqav2_val", 3), ("textvqa_val", 2)])
def test_open_questions_have_no_chance_and_the_scores_say_why(task, number, tmp_path):
    found = scored(BY_TASK[task], tmp_path)
    assert set(found["chance"].values()) == {None}
    assert found["guessed"]["metrics"] == {}
    assert f"{number} of {number} questions are open" in found["no_chance"]


def test_one_open_question_among_others_is_counted(tmp_path):
    found = scored(BY_TASK["realworldqa"], tmp_path)
    assert found["chance"] == {"all": None}
    assert "1 of 3 questions are open" in found["no_chance"]


def test_questions_with_yes_or_no_are_open_where_the_task_has_other_answers_too(tmp_path):
    """GQA's first picture has only questions with yes or no here, which does not make GQA a task of those."""
    item = BY_TASK["gqa"]
    rows = [{**row, "answer": answer} for row, answer in zip(item.rows, ["yes", "no", "red"], strict=True)]
    asked = Benchmark("gqa", rows, item.answers, {**item.lmms, "only": {"imageId": "n0"}}, item.pictures)
    assert "2 of 2 questions are open" in scored(asked, tmp_path)["no_chance"]


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("Which way?\nA. left\nB. right\nAnswer with the letter.", "AB"),
        ("Which?\n(A) 1\n(B) 2\n(C) 3", "ABC"),
        ("Is it open? (a) yes (b) no", "AB"),
        ("Which?\nA.left\nB.right", "AB"),
        ("Vitamin A. helps?\nA: eyes\nB: bones", "AB"),
        ("Example: A. cat B. dog\nNow: A. tree B. house C. car", "ABC"),
        ("Which letter is on the sign?\nA. B\nB. C", "AB"),
        ("Who is A. Miller?", ""),
        ("What does section B. say about C. elegans?", ""),
    ],
)
def test_options_are_letters_that_a_question_lists_in_order(text, letters):
    assert "".join(listed_letters(text)) == letters


# ---- the whole way ----


@pytest.mark.slow
def test_the_workflow_asks_a_checkpoint_under_every_condition_in_shards(tmp_path, stock_export):
    """From the parquet file to the scores under the experiment's name, by the Snakefile's own rules."""
    write_rows(BY_TASK["pope_random"].rows, tmp_path / "pope.parquet")
    task = {"source": "pope", "kind": "lmms", "lmms": {"task": "pope_random"}, "max_new_tokens": 3}
    task |= {"conditions": {"permuted": 2, "blank": True, "text_only": True}, "shards": 2}
    folder = stock_export.parent / "x" / "hf"
    config = {
        "extends": str(ROOT / "config/config.yaml"),
        "sources": {"pope": {"kind": "path", "annotations": [str(tmp_path / "pope.parquet")]}},
        "models": {"tiny": {"kind": "path", "role": "checkpoint", "path": str(folder)}},
        "experiments": {"other": {"checkpoint": "tiny", "tasks": ["pope"]}},
        "evaluation": {"tasks": {"pope": {**task, "max_empty_share": 1, "expected_questions": 4}}},
        "python_evaluation": warm_python.python(),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    target = "experiments/other/evaluation/pope.json"
    command = [warm_python.python(), "-m", "snakemake", "-s", ROOT / "Snakefile", "--cores", "1", target]
    subprocess.run([*command, "--configfile", "config.yaml"], cwd=tmp_path, check=True)
    found = load_json(tmp_path / target)
    assert {name: list(by_seed) for name, by_seed in found["metrics"].items()} == {
        "normal": ["0"],
        "permuted": ["0", "1"],
        "blank": ["0"],
        "text_only": ["0"],
    }
    assert found["metrics"]["normal"]["0"].keys() >= {"pope_f1_score", "pope_precision", "pope_recall"}
    assert found["accuracy"]["permuted"]["all"]["questions"] == 4
    assert found["lmms_eval"]["task"] == "pope_random"


# ---- lmms-eval's own command line ----


def asked_by_its_command_line(folder, *arguments, **environment):
    """(metrics, answers in the task's order) of POPE in small."""
    item = BY_TASK["pope_adv"]
    write_local_task(item, folder)
    command = [sys.executable, "-m", "lmms_eval", "eval", "--tasks", "local_pope_adv", *arguments]
    options = {"--include_path": folder, "--output_path": folder / "out", "--gen_kwargs": "max_new_tokens=4"}
    given = [str(word) for pair in options.items() for word in pair]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    subprocess.run(
        [*command, *given, "--force_simple", "--log_samples"],
        env={**os.environ, **offline, "PYTHONPATH": str(ROOT), **environment},
        cwd=folder,
        check=True,
    )
    [results], [samples] = (list((folder / "out").rglob(name)) for name in ("*_results.json", "*.jsonl"))
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return load_json(results)["results"]["local_pope_adv"], ["".join(row["filtered_resps"]) for row in rows]


@pytest.mark.slow
def test_a_vanilla_export_runs_as_llava_hf(tmp_path, stock_export):
    folder = stock_export.parent / "x" / "hf"
    model = f"pretrained={folder},device=cpu,device_map=cpu"
    metrics, answers = asked_by_its_command_line(tmp_path, "--model", "llava_hf", "--model_args", model)
    assert len(answers) == 4 and all(answers)
    assert (
        metrics["pope_accuracy,none"]
        == sum(
            answer.lower().strip() == row["answer"]
            for answer, row in zip(answers, BY_TASK["pope_adv"].rows, strict=True)
        )
        / 4
    )


@pytest.mark.slow
def test_a_variant_runs_as_our_plug_in_and_answers_as_it_does_to_us(tmp_path, compressed_export):
    folder = compressed_export.parent / "x" / "hf"
    arguments = (
        "--model",
        "spatial_llava",
        "--model_args",
        f"pretrained={folder},device=cpu",
        "--batch_size",
        "3",
    )
    _, answers = asked_by_its_command_line(tmp_path, *arguments, LMMS_EVAL_PLUGINS="llava_ext.lmms")
    item = BY_TASK["pope_adv"]
    _, manifest = prepared(item, tmp_path)
    asked = read_questions(spec_of(item), manifest)
    loaded, spec = load_checkpoint(compressed_export), spec_of(item, max_new_tokens=4)
    with TASKS["lmms"].pictures(manifest, None, asked) as shown:
        chunk = Chunk(asked, {q.image: decode_picture(q.image, shown(q.image)) for q in asked})
    assert answers == [said.text for said in answer(loaded, chunk, asked, Condition("normal"), spec)]
