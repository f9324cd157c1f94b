"""Scores and comparisons from rows alone: counts that were worked out by hand, bounds, pairs."""

import json

import numpy as np
import pandas as pd
import pytest

from workflow_scripts.config.evaluation import TaskSpec
from workflow_scripts.evaluate import compare, link, score
from workflow_scripts.evaluate.statistics import Settings
from workflow_scripts.io import UserError, read_json, write_json

QUICK = {"resamples": 200}


def predictions(folder, answers, right=None, strata=None):
    """A finished run of predictions: ``answers`` by (condition, seed), two questions a picture."""
    run = folder / "runs" / "predict" / "vanilla-t-1"
    (run / "state").mkdir(parents=True)
    rows = [
        {
            "question": f"q{i}",
            "question_digest": f"d{i}",
            "picture": f"{i // 2}.jpg",
            "stratum": (strata or ["where"])[i % len(strata or ["where"])],
            "text": f"question {i}?",
            "right": [(right or ["yes"] * len(given))[i]],
            "choices": [],
            "condition": condition,
            "seed": seed,
            "prompt_digest": "p",
            "answer": text,
            "raw": f"{text}</s>",
            "tokens": [1],
        }
        for (condition, seed), given in answers.items()
        for i, text in enumerate(given)
    ]
    pd.DataFrame(rows).to_parquet(run / "state" / "predictions.parquet")
    said = {"run": run.name, "task": "t", "folder": "state", "digest": "d", "checkpoint": {"run": "v-1"}}
    said |= {"interventions": {}, "source": {"name": "s"}, "harness": {"name": "h", "version": 1}}
    count = len(next(iter(answers.values())))
    write_json(
        run / "manifest.json", {**said, "asked": {"kind": "shapes"}, "questions": count, "pictures": 1}
    )
    return run / "manifest.json"


def scored(folder, answers, right=None, strata=None, **task):
    """The scores' manifest."""
    manifest = folder / "runs" / "score" / "vanilla-t-2" / "manifest.json"
    spec = score.ScoreSpec(task=TaskSpec.model_validate({"source": "s", **task}), **QUICK)
    score.score(spec, predictions(folder, answers, right, strata), manifest)
    return manifest


def values(found, condition="normal"):
    return {kind: cell["value"] for kind, cell in found["accuracy"][condition].items()}


def test_accuracies_by_stratum_and_condition(tmp_path):
    answers = {
        ("normal", 0): ["yes", "yes", "yes", "no"],
        ("permuted", 0): ["no", "yes", "no", "no"],
        ("permuted", 1): ["yes", "yes", "no", "no"],
        ("blank", 0): ["no"] * 4,
    }
    found = read_json(scored(tmp_path, answers, strata=["where", "shape"]))
    assert values(found) == {"all": 0.75, "where": 1.0, "shape": 0.5}
    # the mean of both permutations of each question
    assert values(found, "permuted") == {"all": 0.375, "where": 0.25, "shape": 0.5}
    assert values(found, "blank")["all"] == 0
    assert {kind: cell["value"] for kind, cell in found["psi"].items()} == {
        "all": 0.5,
        "where": 0.75,
        "shape": 0.0,
    }
    assert all(c["low"] <= c["value"] <= c["high"] for c in found["accuracy"]["normal"].values())
    assert found["accuracy"]["normal"]["all"]["questions"] == 4
    assert found["accuracy"]["normal"]["all"]["pictures"] == 2


def test_nothing_right_has_no_permutation_index(tmp_path):
    found = read_json(scored(tmp_path, {("normal", 0): ["no", "no"], ("permuted", 0): ["no", "yes"]}))
    assert found["psi"] == {"all": None, "where": None}
    assert read_json(scored(tmp_path / "b", {("normal", 0): ["yes", "yes"]}))["psi"] == {}


def test_chance_is_weighted_by_the_strata(tmp_path):
    right = ["left", "red", "right", "blue", "left", "green"]
    found = read_json(scored(tmp_path, {("normal", 0): right}, right, ["where", "colour"]))
    assert found["chance"] == {
        "all": pytest.approx((1 / 2 + 1 / 3) / 2, abs=1e-3),
        "where": 0.5,
        "colour": 0.3333,
    }


def test_empty_and_unreadable_answers_are_counted_in_every_condition(tmp_path):
    answers = {("normal", 0): ["yes", "no", "yes", "yes"], ("blank", 0): ["", "hm", "yes", ""]}
    found = read_json(scored(tmp_path, answers, metric="yes_no"))
    cell = found["accuracy"]["blank"]["all"]
    assert (cell["empty"], cell["unparsed"], cell["value"]) == (2, 3, 0.25)


@pytest.mark.parametrize(
    ("given", "task", "message"),
    [
        (
            ["yes", "", "yes", ""],
            {},
            r"tasks\.t: 2 of 4 answers are empty, more than max_empty_share: 0.02.*'question 1\?'",
        ),
        (
            ["yes", "hm", "no", "?!"],
            {"metric": "yes_no"},
            r"2 of 4 answers can't be read by metric: yes_no.*'hm</s>'",
        ),
        (["yes"] * 4, {"expected_questions": 5}, r"tasks\.t\.expected_questions: 5, but 4 questions"),
    ],
)
def test_a_task_above_its_bounds_fails_with_examples(tmp_path, given, task, message):
    with pytest.raises(UserError, match=message):
        scored(tmp_path, {("normal", 0): given}, **task)
    assert not (tmp_path / "runs/score/vanilla-t-2/manifest.json").exists()
    scored(
        tmp_path / "b",
        {("normal", 0): given},
        **{**task, "max_empty_share": 1, "max_unparsed_share": 1, "expected_questions": 4},
    )


def test_examples_are_the_same_for_every_checkpoint_and_show_rare_strata(tmp_path):
    first = read_json(scored(tmp_path / "a", {("normal", 0): ["yes"] * 40}, examples=3))
    second = read_json(scored(tmp_path / "b", {("normal", 0): ["no"] * 40}, examples=3))
    pictures = [example["image"] for example in first["examples"]]
    assert len(pictures) == 3 and pictures != ["0.jpg", "1.jpg", "2.jpg"]
    assert [example["image"] for example in second["examples"]] == pictures
    [asked, _] = first["examples"][0]["questions"]
    assert asked["answers"] == {"normal": {"text": "yes", "score": 1.0}}


def test_the_named_file_says_where_the_rows_lie(tmp_path):
    manifest = scored(tmp_path, {("normal", 0): ["yes", "no"]})
    output = tmp_path / "experiments" / "vanilla" / "evaluation" / "t.json"
    found = link.link_scores("vanilla", manifest, output)
    assert found["experiment"] == "vanilla" and found["accuracy"] == read_json(manifest)["accuracy"]
    assert len(pd.read_parquet(output.parent / found["paths"]["predictions"])) == 2
    assert list(pd.read_parquet(output.parent / found["paths"]["scores"]).score) == [1, 0]


# ---- comparisons ----


def compared(folder, first, second, tasks=("a", "b")):
    """``first`` against ``second``: answers by task."""
    manifests = [
        {
            name: scored(folder / side / name, {("normal", 0): given[name]}, strata=["x", "y"])
            for name in tasks
        }
        for side, given in (("e", first), ("v", second))
    ]
    return compare.compare(compare.CompareSpec(experiment="e", baseline="v", **QUICK), *manifests)


def test_differences_are_paired_and_adjusted(tmp_path):
    rng = np.random.default_rng(1)
    base = ["yes" if right else "no" for right in rng.random(200) < 0.6]
    better = ["yes" if i % 5 == 0 else given for i, given in enumerate(base)]
    found = compared(tmp_path, {"a": better, "b": base}, {"a": base, "b": base})
    gain = (better.count("yes") - base.count("yes")) / 200
    whole = found["tasks"]["a"]["all"]
    assert whole["value"] == pytest.approx(gain) and whole["low"] > 0 and whole["significant"]
    assert whole["p_holm"] == pytest.approx(min(1, 2 * whole["p"]), rel=1e-3)
    same = found["tasks"]["b"]["all"]
    assert (same["value"], same["p"], same["significant"]) == (0, 1, False)
    assert set(found["tasks"]["a"]) == {"all", "x", "y"}
    assert whole["detectable"] > 0


def test_other_questions_are_not_compared(tmp_path):
    rows = pd.read_parquet(scored(tmp_path, {("normal", 0): ["yes", "no"]}).with_name("scores.parquet"))
    with pytest.raises(UserError, match="2 questions differ"):
        compare.differences(rows, rows.assign(question_digest="other"), Settings(resamples=100))


def test_the_commands_write_what_the_functions_say(tmp_path):
    manifest = scored(tmp_path, {("normal", 0): ["yes", "no"]})
    written = json.loads(manifest.read_text())
    spec = score.ScoreSpec(task=TaskSpec(source="s"), **QUICK).model_dump_json()
    said = tmp_path / "runs/predict/vanilla-t-1/manifest.json"
    score.main(["--spec", spec, "--predictions", str(said), "--manifest", str(manifest)])
    assert json.loads(manifest.read_text()) == written
    spec = json.dumps({"experiment": "e", "baseline": "v", **QUICK})
    files = ["--scores", str(manifest), "--baseline", str(manifest), "--output", str(tmp_path / "c.json")]
    compare.main(["--spec", spec, *files])
    assert read_json(tmp_path / "c.json")["tasks"]["t"]["all"]["value"] == 0
