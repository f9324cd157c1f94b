"""Manifests of every kind, and what a browser would make of a page."""

import json
import random
import re
import zipfile
from html.parser import HTMLParser

import pandas
import pytest

from workflow_scripts.demo import shapes
from workflow_scripts.io import write_json
from workflow_scripts.report import step as report

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


def estimate(value, questions):
    spread = 1.96 * (value * (1 - value) / questions) ** 0.5
    counts = {"questions": questions, "pictures": questions, "empty": 0, "unparsed": 0}
    return {"value": value, "low": value - spread, "high": value + spread, **counts}


def accuracies(where, shape):
    cells = {"where": estimate(where, 240), "shape": estimate(shape, 100)}
    return {"all": estimate((240 * where + 100 * shape) / 340, 340), **cells}


def evaluation(experiment, where, permuted, task="shapes"):
    """The scores of one task under an experiment's name."""
    answers = {"normal": "top left", "permuted": HOSTILE, "blank": ""}
    asked = {
        "name": "q1",
        "type": "where",
        "question": HOSTILE,
        "answer": "top left",
        "answers": {
            name: {"text": text, "score": float(text == "top left")} for name, text in answers.items()
        },
    }
    psi = {kind: {"value": 0.5, "low": 0.4, "high": 0.6} for kind in ("all", "where")}
    blank = accuracies(0.25, 0.2)
    blank["all"]["empty"] = 7
    return {
        "experiment": experiment,
        "task": task,
        "checkpoint": {"run": "x", "digest": "d", "loaded_with": "x"},
        "accuracy": {
            "normal": accuracies(where, 0.9),
            "permuted": accuracies(permuted, 0.88),
            "blank": blank,
        },
        "strata": ["where", "shape"],
        "psi": psi | {"shape": None},
        "chance": {"all": 0.25, "where": 0.25, "shape": 0.25},
        "pictures": 240,
        "source": {"name": "s", "digest": "d"},
        "harness": {"name": "own", "version": 1},
        "asked": {"kind": "shapes", "permute_seed": 11},
        "scored": {"metric": "exact_match"},
        "statistics": {"confidence": 0.95, "resamples": 2000, "seed": 0},
        "examples": [{"image": HOSTILE, "questions": [asked]}, {"image": "a.jpg", "questions": [asked]}],
    }


def comparison(experiment, baseline):
    """The differences to a baseline: one that is significant, one that is not."""

    def delta(value, significant):
        found = {"value": value, "low": value - 0.02, "high": value + 0.02, "p": 0.01, "p_holm": 0.02}
        return found | {"detectable": 0.03, "questions": 340, "pictures": 240, "significant": significant}

    cells = {"all": delta(-0.4, True), "where": delta(-0.58, True), "shape": delta(0.01, False)}
    return {"experiment": experiment, "baseline": baseline, "confidence": 0.95, "tasks": {"shapes": cells}}


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
        "vision": 400,
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
            (
                tmp_path / f"experiments/e{number}/evaluation/shapes.json",
                evaluation(name, where, permuted),
            ),
        ):
            write_json(path, content)
            paths.append(path)
    write_json(tmp_path / "experiments/odd/comparison.json", comparison("odd <name> & $x$", "vanilla"))
    return [*paths, tmp_path / "experiments/odd/comparison.json"]


def answered(folder, name, right, **statistics):
    """An experiment's evaluation with its rows: ten questions, those in ``right`` answered rightly."""
    home = folder / "experiments" / name
    rows = [
        {
            "question": f"q{number}",
            "picture": "a.jpg",
            "stratum": "where",
            "text": f"Where is {number}?",
            "right": ["top"],
            "condition": condition,
            "seed": 0,
            "answer": "top" if number in right else f"{name} says",
            "score": float(number in right),
        }
        for condition in ("normal", "blank")
        for number in range(10)
    ]
    table = pandas.DataFrame(rows)
    home.mkdir(parents=True)
    table.drop(columns="score").to_parquet(home / "predictions.parquet")
    table[["question", "condition", "seed", "score"]].to_parquet(home / "scores.parquet")
    content = evaluation(name, 0.9, 0.8)
    content["paths"] = {key: f"../{key}.parquet" for key in ("predictions", "scores")}
    content["statistics"] = content["statistics"] | statistics
    write_json(home / "evaluation/shapes.json", content)
    return home / "evaluation/shapes.json"


def rendered(paths, tmp_path):
    """The page's HTML, made by the step."""
    report.write_report(paths, tmp_path / "report" / "index.html")
    return (tmp_path / "report" / "index.html").read_text()
