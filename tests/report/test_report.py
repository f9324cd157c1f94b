"""The report: everything that is in the manifests, nothing that can run, and no trouble when parts are
absent.
"""

import csv
import json
import random
import re
import zipfile
from html.parser import HTMLParser

import pytest

from tests.support.demo import load_json
from workflow_scripts.demo import shapes
from workflow_scripts.io import UserError, write_json
from workflow_scripts.report import step as report
from workflow_scripts.report.collect import collect, metrics
from workflow_scripts.report.table import text_table

HOSTILE = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>&\"'{{7*7}}$\\frac"
VOID = {"meta", "img", "br", "link", "input", "hr", "wbr", "path", "use"}


class Page(HTMLParser):
    """What a browser would make of the page, as far as the tests ask."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open, self.attributes = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attributes]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]} at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def evaluation(run, where, permuted):
    png = "data:image/png;base64,AAAA"
    asked = {
        "type": "where",
        "question": HOSTILE,
        "answer": "top left",
        "answers": {"normal": "top left", "permuted": HOSTILE, "blank": ""},
    }
    return {
        "checkpoint": {"run": run, "digest": "d", "loaded_with": "x"},
        "accuracy": {
            "normal": {"where": where, "shape": 0.9},
            "permuted": {"where": permuted, "shape": 0.88},
            "blank": {"where": 0.25, "shape": 0.2},
        },
        "question_types": ["where", "shape"],
        "questions": {"where": 240, "shape": 100},
        "chance": {"where": 0.25, "shape": 0.25},
        "pictures": 240,
        "source": {"name": "held_out", "digest": "d"},
        "spec": {"permute_seed": 11},
        "examples": [{"image": HOSTILE, "thumbnail": png, "questions": [asked]}],
    }


def checkpoint(name, export, pretrain="p", finetune="f"):
    return {
        "experiment": name,
        "description": HOSTILE,
        "interventions": {"normalize_projector": True},
        "paths": {"hf": "../../x"},
        "runs": {"pretrain": pretrain, "finetune": finetune, "export": export},
        "loads_with": {"hf": [HOSTILE]},
        "digest": "d",
    }


def training(folder, stage, run, losses):
    """A finished training's manifest with its metrics and provenance."""
    home = folder / "runs" / stage / run
    state = home / "state"
    state.mkdir(parents=True)
    rows = [
        {"step": i, "loss": loss, "time": 100.0 + 2 * i, "samples_per_s": 50.0}
        for i, loss in enumerate(losses, 1)
    ]
    (state / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "lo')
    write_json(
        state / "provenance.json",
        {
            "command": ["python", HOSTILE],
            "code": {"commit": HOSTILE},
            "hardware": {"cpu": HOSTILE, "gpus": []},
        },
    )
    write_json(
        home / "manifest.json",
        {
            "stage": stage,
            "run": run,
            "folder": "state",
            "step": len(losses),
            "metrics": {"final_loss": losses[-1]},
        },
    )
    return home / "manifest.json"


def jpeg():
    rng = random.Random(1)
    return shapes.encode(shapes.draw_scene(shapes.random_scene(rng, True), rng, 56), "JPEG")


@pytest.fixture
def data(tmp_path):
    """Source, scan and mixture made by the real steps, with hostile names; returns the manifests."""
    from workflow_scripts.merge import step as merge
    from workflow_scripts.scan import step as scan

    source = tmp_path / "data" / "sources" / "s"
    source.mkdir(parents=True)
    names = {
        "a.jpg": jpeg(),
        "cut.jpg": shapes.truncate(jpeg()),
        "page.jpg": b"<script>alert(3)</script><html>",
        "<b>.jpg": b"<i>",
    }
    with zipfile.ZipFile(source / "images.zip", "w") as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    says = [{"from": "human", "value": f"<image>\n{HOSTILE}"}, {"from": "gpt", "value": HOSTILE}]
    records = [
        {"id": f"{HOSTILE}{i}", "image": name, "conversations": says}
        for i, name in enumerate([*names, "gone.jpg"])
    ]
    write_json(source / "a.json", records)
    manifest = {
        "name": "s",
        "kind": "path",
        "digest": "d",
        "files": [],
        "annotations": [{"path": "a.json", "role": "annotations"}],
    }
    write_json(source / "manifest.json", {**manifest, "images": {"type": "zip", "path": "images.zip"}})
    scanned, mixture = tmp_path / "data/scans/s/manifest.json", tmp_path / "data/mixtures/m/manifest.json"
    scan.main(["--source", str(source / "manifest.json"), "--manifest", str(scanned)])
    policy = {
        "truncated": "keep",
        "corrupt": "drop",
        "not_an_image": "drop",
        "missing": "drop",
        "max_dropped_share": 1.0,
    }
    spec = {"parts": [{"annotations": "s", "images": [{"source": "s"}], "policy": policy}]}
    merge.main(
        [
            "--name",
            "m",
            "--spec",
            json.dumps(spec),
            "--sources",
            str(source / "manifest.json"),
            "--scans",
            str(scanned),
            "--manifest",
            str(mixture),
        ]
    )
    return [source / "manifest.json", scanned, mixture]


def survey(folder):
    """A survey of the mixture with two ways in which an image takes tokens."""
    numbers = {
        "samples": 3,
        "with_picture": 2,
        "tokens": 900,
        "labels": 90,
        "unlabelled": {"cut_away": 1},
        "cut": 2,
        "picture_cut": 0,
        "length": {"median": 300, "p95": 512, "longest": 512},
    }
    bars = {"edges": [0, 256, 512, 768], "with_picture": [0, 1, 1], "text_only": [1, 0, 0]}
    layout = {"sources": {HOSTILE: numbers}, "all": numbers, "histogram": bars, "examples": {}, "of": []}
    layouts = [{**layout, "tokens_per_image": tokens} for tokens in (4, 16)]
    content = {"survey": "m-v1-0", "mixture": "m", "prompt_version": "v1", "model_max_length": 512}
    write_json(folder / "data/surveys/m-v1-0/manifest.json", {**content, "layouts": layouts})
    return folder / "data/surveys/m-v1-0/manifest.json"


@pytest.fixture
def everything(tmp_path, data):
    """Manifests of every kind, from two experiments that share stage 1."""
    paths = [*data, survey(tmp_path), training(tmp_path, "pretrain", "p", [6.0, 5.0, 4.0])]
    for name, where, permuted in (("vanilla", 0.98, 0.3), ("odd <name> & $x$", 0.4, 0.39)):
        number = len(paths)
        paths.append(training(tmp_path, "finetune", f"f{number}", [5.0, 0.5, 0.05, 0.04]))
        for path, content in (
            (
                tmp_path / f"experiments/e{number}/checkpoint.json",
                checkpoint(name, f"x{number}", "p", f"f{number}"),
            ),
            (tmp_path / f"runs/evaluate/x{number}/manifest.json", evaluation(f"x{number}", where, permuted)),
        ):
            write_json(path, content)
            paths.append(path)
    return paths


def rendered(paths, tmp_path):
    report.write_report(paths, tmp_path / "report" / "index.html")
    return (tmp_path / "report" / "index.html").read_text()


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


def test_accuracies_are_in_the_page_the_csv_and_the_text(everything, tmp_path):
    page = Page(rendered(everything, tmp_path)).text
    assert "vanilla 98 30 25 90 88 20" in page
    assert "chance 25 25 questions 240 100" in page
    rows = list(csv.DictReader((tmp_path / "report/accuracy.csv").open()))
    assert len(rows) == 2 * 2 * 3
    wanted = {
        "experiment": "vanilla",
        "question_type": "where",
        "condition": "permuted",
        "accuracy": "0.3",
        "chance": "0.25",
    }
    wanted |= {"questions": "240", "standard_error": "0.0296", "permute_seed": "11"}
    assert wanted in rows
    table = report.write_report(everything, tmp_path / "report" / "index.html").splitlines()
    assert table[2].split() == ["vanilla", "98", "30", "25", "|", "90", "88", "20"]


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
    assert "16 900 10.0 % 300 512 512 2 0 1 cut away" in page.text
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
    without_evaluation = [path for path in everything if "evaluate" not in str(path)]
    page = Page(rendered(without_evaluation, tmp_path))
    ids = {value for _, key, value in page.attributes if key == "id"}
    assert "accuracy" not in ids
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
    for kind in ("checkpoint.json", "runs/evaluate", "data/mixtures", "data/scans", "data/sources"):
        assert kind in words
