"""The report: everything that is in the manifests, nothing that can run, and no trouble when parts are
absent.
"""

import csv
import json
import re

import pandas
import pytest

from tests.report.conftest import HOSTILE, Page, answered, checkpoint, evaluation, rendered, training
from tests.support.demo import load_json
from workflow_scripts.evaluate.published import PUBLISHED, published_about
from workflow_scripts.evaluate.two_d_shapes import STRATA
from workflow_scripts.io import UserError, write_json
from workflow_scripts.report import step as report
from workflow_scripts.report.collect import collect, metrics
from workflow_scripts.report.table import text_table


def test_the_page_is_well_formed_and_holds_no_code_from_data(everything, tmp_path):
    text = rendered(everything, tmp_path)
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert "<script" not in text
    assert not [found for found in page.attributes if found[1].startswith("on")]
    assert "alert(1)" in page.text, "hostile text is shown, as text"
    assert "{{7*7}}" in page.text


def test_the_page_needs_nothing_from_elsewhere(everything, tmp_path):
    text = rendered(everything, tmp_path)
    for tag, key, value in Page(text).attributes:
        if key in ("src", "srcset", "data", "poster"):
            assert value.startswith("data:image/"), (tag, key, value)
        if key in ("href", "xlink:href") and tag != "a":
            assert value.startswith("#"), (tag, key, value)
        if tag == "a":
            assert "://" not in value
    assert "@import" not in text
    assert "url(http" not in text
    assert "default-src 'none'" in text


def test_accuracies_are_in_the_page_the_tables_and_the_text(everything, tmp_path):
    page = Page(rendered(everything, tmp_path)).text
    assert "vanilla 98 30 25 90 88 20" in page
    assert "chance 25 25 questions 240 100" in page
    rows = list(csv.DictReader((tmp_path / "report/accuracy.csv").open()))
    assert len(rows) == 2 * 3 * 3
    wanted = {"experiment": "vanilla", "task": "shapes", "stratum": "where", "condition": "permuted"}
    wanted |= {"accuracy": "0.3", "chance": "0.25", "questions": "240", "psi": "0.5", "psi_low": "0.4"}
    wanted |= {"metric": "exact_match", "harness": "own 1"}
    assert [row for row in rows if wanted.items() <= row.items()]
    table = report.write_report(everything, tmp_path / "report" / "index.html").splitlines()
    assert table[2].split() == ["vanilla", "98", "30", "25", "|", "90", "88", "20"]
    for name in ("accuracy", "differences"):
        csv_rows = len(pandas.read_csv(tmp_path / f"report/{name}.csv"))
        assert csv_rows == len(pandas.read_parquet(tmp_path / f"report/{name}.parquet")) > 0


def test_tasks_and_experiments_have_intervals_differences_and_floors(everything, tmp_path):
    text = rendered(everything, tmp_path)
    page = Page(text).text
    assert (
        "vanilla 95.6 [93.5 to 97.8] PSI 50.0 [40.0 to 60.0] permuted 47.1, blank 23.5, chance 25.0" in page
    )
    assert "54.7 [49.4 to 60.0] -40.0 * PSI" in page
    significant, other = (
        re.search(rf'<span class="(\w+)" [^>]*>{words}', text) for words in (r"-58.0 \*", r"\+1.0 \(n")
    )
    assert (significant[1], other[1]) == ("bad", "soft")
    assert "differences from 3.0 on" in text
    assert "blank: 7 empty" in page
    differences = list(csv.DictReader((tmp_path / "report/differences.csv").open()))
    assert [row["stratum"] for row in differences if row["significant"] == "True"] == ["all", "where"]


def test_a_task_that_an_experiment_is_not_asked_is_an_empty_place(everything, tmp_path):
    path = tmp_path / "experiments/vanilla/evaluation/pope.json"
    write_json(path, evaluation("vanilla", 0.9, 0.9, "pope"))
    page = Page(rendered([*everything, path], tmp_path))
    assert "not asked" in page.text
    assert {"task-1", "task-2"} <= {value for _, key, value in page.attributes if key == "id"}


def test_examples_show_the_pictures_that_are_still_there(everything, tmp_path):
    assert rendered(everything, tmp_path).count('alt="example picture') == 0, (
        "one of the two is not in the source"
    )
    for path in everything:
        content = json.loads(path.read_text())
        if "examples" in content and "accuracy" in content:
            write_json(path, {**content, "examples": content["examples"][1:]})
    assert rendered(everything, tmp_path).count('alt="example picture a.jpg') == 1


def test_what_others_have_published_stands_beside_our_numbers(everything, tmp_path):
    assert "Published by others" not in rendered(everything, tmp_path)
    rewrite_scores(everything, scored={"metric": "exact_match", "benchmark": "pope"})
    page = Page(rendered(everything, tmp_path)).text
    section = page[page.index("Published by others, not measured here") :]
    assert "vanilla here 95.6 47.1 50.0 98.0 90.0 own 1: greedy; exact_match" in section
    assert "LLaVA-1.5-7B 85.9 F1 – – – – LLaVA's own scripts: greedy, batch 1; mean over the" in section
    assert "LLaVA-1.5-7B 87.3 87.1 0.3 – – the paper's own scripts: sampled at temperature 0.2" in section
    assert "the 3,000 popular questions only" in section
    rows = list(csv.DictReader((tmp_path / "report/published.csv").open()))
    assert {(row["benchmark"], row["value"], row["unit"]) for row in rows} >= {("pope", "85.9", "%")}
    assert {row["metric"] for row in rows} == {"F1", ""}, "where it is not ours, an accuracy"
    assert all(row["harness"] and row["settings"] and row["source"] for row in rows)


def test_a_tasks_own_metrics_stand_beside_what_guesses_would_get(everything, tmp_path):
    assert "By the task's own metrics" not in rendered(everything, tmp_path)
    rewrite_scores(
        everything,
        metrics={"normal": {"0": {"mme_perception_score": 1203.25, "other": 0.5}}},
        guessed={"metrics": {"mme_perception_score": 748.6}, "draws": 20, "reason": ""},
    )
    page = Page(rendered(everything, tmp_path)).text
    section = page[page.index("By the task's own metrics") :]
    assert "as is mme_ perception_ score other vanilla 1203 0.5" in section
    assert "guesses 748.6 none" in section


def test_why_there_is_no_chance_level_is_said(everything, tmp_path):
    assert "No chance level" not in rendered(everything, tmp_path)
    unknown = {"all": None, "where": None, "shape": 0.25}
    rewrite_scores(everything, chance=unknown, no_chance="3 of 9 questions are open")
    text = rendered(everything, tmp_path)
    page = Page(text).text
    assert "No chance level: 3 of 9 questions are open." in page
    assert "chance none 25 questions 240 100" in page
    assert '<span title="3 of 9 questions are open">chance: none</span>' in text
    rewrite_scores(everything, no_chance=None)
    assert "No chance level: not known." in Page(rendered(everything, tmp_path)).text


def test_answers_below_chance_are_pointed_at(everything, tmp_path):
    said = "as is: below chance, so the metric may not read the answers"
    assert said not in Page(rendered(everything, tmp_path)).text
    rewrite_scores(everything, chance={"all": 0.99, "where": 0.99, "shape": 0.99})
    assert f"vanilla: blank: 7 empty, {said}." in Page(rendered(everything, tmp_path)).text


def rewrite_scores(paths, **changes):
    """Changes the scores of all experiments."""
    for path in paths:
        content = json.loads(path.read_text())
        if "scored" in content:
            write_json(path, content | changes)


def test_published_numbers_have_sources_and_agree_with_themselves():
    assert len({(item.benchmark, item.model, item.harness) for item in PUBLISHED}) == len(PUBLISHED)
    for item in PUBLISHED:
        assert item.harness.name and item.harness.settings and "arXiv" in item.harness.source
        assert item.unit or 0 < (item.value or item.psi) < 100
        if item.strata:  # as many questions of each
            assert sum(item.strata.values()) / len(item.strata) == pytest.approx(item.value, abs=0.01)
    assert set(STRATA) == {name for item in PUBLISHED for name in item.strata}
    assert published_about(None) == []


def shown_where_they_disagree(page):
    text = Page(page).text
    part = text[text.index("Where experiments disagree") : text.index("The same pictures and questions")]
    return part, re.findall(r"Where is (\d)\?", part)


def test_questions_on_which_experiments_disagree_are_drawn_by_the_seed(tmp_path, data):
    drawn = set()
    for seed in range(5):
        folder = tmp_path / str(seed)
        both = [answered(folder, "one", range(10), seed=seed), answered(folder, "other", range(3), seed=seed)]
        page = rendered([*data, *both], tmp_path)
        part, shown = shown_where_they_disagree(page)
        assert f"shapes : 7 of 10 questions; 2 of them, seed {seed}:" in part
        assert len(shown) == 2 and {int(number) for number in shown} <= set(range(3, 10))
        assert shown == shown_where_they_disagree(rendered([*data, *both], tmp_path))[1]
        assert part.count("✓ top") == part.count("✗ other says") == 2
        assert page.count('alt="example picture a.jpg') >= 2
        drawn.add(tuple(shown))
    assert len(drawn) > 1, "another seed, other questions"


def test_agreement_and_rows_that_are_gone_are_no_trouble(tmp_path, data):
    paths = [answered(tmp_path, "one", range(4)), answered(tmp_path, "other", range(4))]
    assert "shapes : 0 of 10 questions" in Page(rendered(paths, tmp_path)).text
    (tmp_path / "experiments/one/scores.parquet").unlink()
    assert "Where experiments disagree" not in rendered(paths, tmp_path)


def test_a_checkpoint_that_was_not_trained_here_says_so(tmp_path):
    path = tmp_path / "experiments/theirs/checkpoint.json"
    said = {"repo": "llava-hf/llava-1.5-7b-hf", "revision": "0123abc"}
    write_json(path, checkpoint("theirs", "x") | {"runs": {"export": "x"}, "origin": said})
    page = Page(rendered([path], tmp_path)).text
    assert "not trained here: llava-hf/llava-1.5-7b-hf at 0123abc" in page


def test_numbers_near_chance_are_marked(everything, tmp_path):
    text = rendered(everything, tmp_path)
    cells = re.findall(r'<td class="v ([^"]*)"[^>]*>(\d+)</td>', text)
    marks = {number: "guess" in names for names, number in cells}
    assert marks == {
        "98": False,
        "30": True,
        "25": True,
        "90": False,
        "88": False,
        "20": True,
        "40": False,
        "39": False,
    }


def test_each_damaged_file_is_shown_with_what_happened_to_its_sample(everything, tmp_path):
    text = rendered(everything, tmp_path)
    page = Page(text).text
    for words in ("truncated", "not an image", "missing", "gone.jpg", "cut.jpg", "page.jpg"):
        assert words in page
    rows = re.findall(r"<tr>(?:(?!</tr>).)*</tr>", text, flags=re.DOTALL)
    (cut,) = [row for row in rows if "<code>cut.jpg</code>" in row]
    assert "data:image/png" in cut, "what can be decoded of a cut picture is shown"
    assert ">kept</b>" in cut
    (not_a_picture,) = [row for row in rows if "<code>page.jpg</code>" in row]
    assert "&lt;script&gt;alert(3)" in not_a_picture, "the beginning of what is no picture is shown as text"
    assert ">dropped</b>" in not_a_picture


def test_odd_records_are_counted_with_what_was_done(everything, tmp_path):
    mixture = tmp_path / "data/mixtures/m/manifest.json"
    content = json.loads(mixture.read_text())
    content["parts"][0]["findings"] = {
        "system_turn": {"action": "keep", "count": 3},
        "late_system": {"action": "drop", "count": 1},
    }
    write_json(mixture, content)
    page = Page(rendered(everything, tmp_path)).text
    start = page.index("odd records")
    assert "1 late system (dropped), 3 system turn (kept)" in page[start : start + 600]


def test_lengths_are_drawn_and_told(everything, tmp_path):
    page = Page(rendered(everything, tmp_path))
    assert "prompt version v1 , cut at 512 tokens" in page.text
    assert "16 900 18.0 % 300 512 512 2 0 1 cut away" in page.text
    [label] = [
        value
        for tag, key, value in page.attributes
        if (tag, key) == ("svg", "aria-label") and "length" in value
    ]
    assert "16 tokens per image: median 300, longest 512; 4 tokens per image" in label


def test_trainings_name_the_experiments_that_share_them(everything, tmp_path):
    page = Page(rendered(everything, tmp_path)).text
    assert "pretrain/ p vanilla, odd <name> & $x$" in page
    assert "Running median over 5 steps" in page


def test_a_training_says_which_records_it_left_out(tmp_path):
    path = training(tmp_path, "finetune", "f", [1.0])
    records = [{"record": 12, "id": HOSTILE, "source": "captions"}]
    write_json(path, json.loads(path.read_text()) | {"skipped": [{"after_step": 4, "records": records}]})
    assert f"left out: #12 ({HOSTILE}, captions)" in Page(rendered([path], tmp_path)).text


def test_only_the_parts_that_exist_are_there(everything, data, tmp_path):
    without_evaluation = [path for path in everything if path.parent.name not in ("evaluation", "odd")]
    page = Page(rendered(without_evaluation, tmp_path))
    ids = {value for _, key, value in page.attributes if key == "id"}
    assert "evaluation" not in ids
    assert {"training", "data", "experiments"} <= ids
    assert not (tmp_path / "report/accuracy.csv").exists()
    for path in everything:
        assert Page(rendered([path], tmp_path)).open == []
    assert text_table({}) == ""


def test_trainings_without_metrics_are_listed(tmp_path):
    path = training(tmp_path, "finetune", "f", [1.0])
    for name in ("metrics.jsonl", "provenance.json"):
        (path.parent / "state" / name).unlink()
    page = Page(rendered([path], tmp_path)).text
    assert "finetune/ f" in page
    assert "No metrics were found" in page


def test_a_step_that_was_computed_twice_counts_once(tmp_path):
    path = training(tmp_path, "finetune", "f", [3.0, 2.0])
    with (path.parent / "state" / "metrics.jsonl").open("a") as stream:
        stream.write('\n{"step": 2, "loss": 1.5, "time": 110.0}\n{"step": 3, "loss": 1.0, "time": 112.0}\n')
    found = metrics((path, load_json(path)))
    assert [(row["step"], row["loss"]) for row in found] == [(1, 3.0), (2, 1.5), (3, 1.0)]


def test_pictures_of_an_unreadable_archive_are_left_out(everything, tmp_path):
    (tmp_path / "data/sources/s/images.zip").unlink()
    page = Page(rendered(everything, tmp_path)).text
    assert "cut.jpg" in page
    assert "No samples are shown" in page


def test_a_file_that_is_no_manifest_is_named(tmp_path, capsys):
    write_json(tmp_path / "x.json", {"hello": 1})
    with pytest.raises(UserError, match=r"x\.json: no manifest"):
        collect([tmp_path / "x.json"])
    with pytest.raises(SystemExit, match="1"):
        report.main(["--inputs", str(tmp_path / "x.json"), "--output", str(tmp_path / "r.html")])
    assert "no manifest" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_the_help_documents_the_inputs(capsys):
    with pytest.raises(SystemExit, match="0"):
        report.main(["--help"])
    words = capsys.readouterr().out
    for kind in (
        "checkpoint.json",
        "comparison.json",
        "evaluation/<task>.json",
        "data/mixtures",
        "data/scans",
        "data/sources",
    ):
        assert kind in words
