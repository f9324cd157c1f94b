"""The survey of a mixture: its numbers, what stops the workflow, what is used again."""

from __future__ import annotations

import json
import os
import re
import signal

import numpy as np
import pytest

from llava_ext.data.samples import open_samples
from tests.support.mixing import DataFolder, conversation
from tests.support.pictures import encoded
from tests.support.trainings import GOLDEN
from workflow_scripts.config.models import PathModel
from workflow_scripts.config.stages import SurveyBounds
from workflow_scripts.io import UserError, read_json
from workflow_scripts.prepare_model.step import prepare
from workflow_scripts.survey import step

VANILLA: dict = {}
FOUR = {"compression_after_projection": True, "final_spatial_size": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The manifests of a language model and of a vision tower with 4 x 4 patches."""
    folder = tmp_path_factory.mktemp("models")
    for name, role, origin in (("llm", "llm", "llm"), ("tower", "vision_tower", "clip_g4")):
        spec = PathModel(kind="path", role=role, path=str(GOLDEN / origin))
        prepare(name, spec, folder / name / "manifest.json")
    return [folder / name / "manifest.json" for name in ("llm", "tower")]


@pytest.fixture
def folder(tmp_path):
    """A mixture of two sources; the second is text only."""
    folder = DataFolder(tmp_path)
    folder.images("pics", "zip", {f"{i}.jpg": encoded(seed=i) for i in range(6)})
    seen = [conversation(f"{i}.jpg", id=f"p{i}", question=f"is it {i}?") for i in range(6)]
    folder.annotations("seen", seen)
    folder.annotations("talk", [conversation(id=f"t{i}", answer="word " * i + "end") for i in range(40)])
    return folder


def mix(folder):
    return folder.mix({"annotations": "seen", "images": [{"source": "pics"}]}, {"annotations": "talk"})


def use(flags=VANILLA, **bounds):
    layout = {"vision_tower": "tower", "vision_feature_select": "patch", "flags": flags}
    plain = {"max_mismatch_share": 0.05, "min_supervised_share": 0.01, **SurveyBounds().model_dump()}
    return {"stage": "finetune", "layout": layout, "bounds": plain | bounds}


def spec(*uses, length=2048, version="v1"):
    about = {"mixture": "M", "prompt_version": version, "model_max_length": length, "code_version": 1}
    return json.dumps({**about, "uses": list(uses)})


def survey(folder, models, *uses, processes=1, skip="", **about):
    manifest = folder.path / "surveys" / "manifest.json"
    mixture, written = folder.mixture / "manifest.json", spec(*uses, **about)
    arguments = ["--name", "S", "--spec", written, "--mixture", str(mixture), "--models", *map(str, models)]
    options = ["--processes", str(processes), "--skip_samples", skip]
    step.main([*arguments, "--manifest", str(manifest), *options])
    return read_json(manifest)


def said(capsys, *arguments, **about):
    with pytest.raises(SystemExit):
        survey(*arguments, **about)
    return capsys.readouterr().err


def table(folder, layout):
    return np.load(folder.path / "surveys" / layout["file"])


def test_numbers_of_each_source_and_of_each_layout(folder, models):
    mix(folder)
    found = survey(folder, models, use(), use(FOUR))
    sixteen, four = sorted(found["layouts"], key=lambda item: -item["tokens_per_image"])
    assert (sixteen["tokens_per_image"], four["tokens_per_image"]) == (16, 4)
    assert sixteen["all"]["tokens"] - four["all"]["tokens"] == 6 * (16 - 4)
    assert sixteen["all"]["labels"] == four["all"]["labels"] > 0
    parts = sixteen["sources"]
    assert {name: part["samples"] for name, part in parts.items()} == {"pics": 6, "talk": 40}
    assert parts["pics"]["with_picture"] == 6 and parts["talk"]["with_picture"] == 0
    for key in ("samples", "tokens", "labels", "cut"):
        assert sixteen["all"][key] == sum(part[key] for part in parts.values())
    rows = table(folder, sixteen)
    assert rows["tokens"].sum() == sixteen["all"]["tokens"] and rows["tokens"].dtype == np.int32
    bars = sixteen["histogram"]
    assert sum(bars["with_picture"]) == 6 and sum(bars["text_only"]) == 40
    assert bars["edges"][0] == 0 and bars["edges"][-1] > 2048
    assert sixteen["all"]["unlabelled"] == {} and sixteen["examples"] == {}


def test_several_processes_find_the_same(folder, models, monkeypatch):
    mix(folder)
    one = survey(folder, models, use(), use(FOUR))
    before = [table(folder, layout) for layout in one["layouts"]]
    for path in (folder.path / "surveys").iterdir():
        path.unlink()
    monkeypatch.setattr(step, "CHUNK", 7)
    assert survey(folder, models, use(), use(FOUR), processes=3) == one
    assert all(
        np.array_equal(old, table(folder, new)) for old, new in zip(before, one["layouts"], strict=True)
    )


def test_what_was_counted_is_not_counted_again(folder, models, capsys):
    """With other bounds nothing is read; another layout, or a damaged table, needs the records."""
    mix(folder)
    first = survey(folder, models, use())
    records = folder.mixture / "samples.json"
    content = records.read_bytes()
    records.unlink()
    again = survey(folder, models, use(max_cut_share=0.5))
    assert again == first
    with pytest.raises(Exception, match=r"samples\.json"):
        survey(folder, models, use(), use(FOUR))
    records.write_bytes(content)
    path = folder.path / "surveys" / first["layouts"][0]["file"]
    path.write_bytes(path.read_bytes()[:-1])
    assert survey(folder, models, use()) == first
    assert len(table(folder, first["layouts"][0])) == 46


def test_a_changed_mixture_is_surveyed_anew(folder, models):
    mix(folder)
    first = survey(folder, models, use())
    folder.mix({"annotations": "talk"})
    second = survey(folder, models, use())
    assert second["inputs"]["mixture"] != first["inputs"]["mixture"]
    assert second["layouts"][0]["all"]["samples"] == 40


def test_masked_samples_stop_the_workflow_with_source_record_and_key(folder, models, capsys):
    folder.annotations("bad", [conversation(id="b0", answer="a</s>b"), conversation(id="b1", answer="")])
    folder.mix({"annotations": "talk"}, {"annotations": "bad"})
    text = said(capsys, folder, models, use())
    assert "source bad: 2 of 2 samples (100.00%) are masked whole" in text
    assert "stages.finetune.max_mismatch_share: 5.0%" in text
    assert "record 41 (id 'b0', source bad, no image)" in text and "source talk" not in text
    assert not (folder.path / "surveys" / "manifest.json").exists()
    allowed = survey(folder, models, use(max_mismatch_share=1.0))
    assert allowed["layouts"][0]["sources"]["bad"]["unlabelled"] == {"mismatch": 1, "end_in_text": 1}


def test_samples_cut_away_stop_the_workflow(folder, models, capsys):
    long = conversation(id="long", question="word " * 300)
    folder.annotations("long", [long, conversation(id="short")])
    folder.mix({"annotations": "talk"}, {"annotations": "long"})
    text = said(capsys, folder, models, use(), length=200)
    assert "source long: 1 of 2 samples (50.00%) have no label after the cut at model_max_length 200" in text
    assert "stages.finetune.survey.max_unlabelled_share: 5.0%" in text and "id 'long'" in text


def test_pictures_cut_away_stop_the_workflow(folder, models, capsys):
    late = {
        "id": "late",
        "image": "0.jpg",
        "conversations": [
            {"from": "human", "value": "word " * 100},
            {"from": "gpt", "value": "yes"},
            {"from": "human", "value": "<image>\nand this?"},
            {"from": "gpt", "value": "no"},
        ],
    }
    folder.annotations("late", [late])
    folder.mix({"annotations": "late", "images": [{"source": "pics"}]}, {"annotations": "talk"})
    text = said(capsys, folder, models, use(), length=150)
    assert "1 of 41 samples (2.44%) lose tokens of a picture by the cut" in text
    assert "stages.finetune.survey.max_picture_cut_share: 1.0%" in text and "id 'late'" in text


def test_a_record_that_cannot_be_encoded_stops_the_workflow(folder, models, capsys):
    mix(folder)
    text = said(capsys, folder, models, use(), version="plain")
    assert "source talk: 40 of 40 samples (100.00%) can't be encoded" in text
    assert "record 7 (id 't0', source talk, no image): prompt version `plain` needs two turns" in text
    assert "mixtures.M.parts" in text


def test_records_that_are_left_out_stop_nothing(folder, models, capsys):
    """Also those that could not be encoded; in the table one token stands for each, as in training."""
    mix(folder)
    names = ",".join(f"t{number}" for number in range(39))
    assert "1 of 1 samples" in said(capsys, folder, models, use(), version="plain", skip=names)
    found = survey(folder, models, use(), version="plain", skip=f"{names},#46")["layouts"][0]
    assert found["all"]["samples"] == 6 and found["left_out"] == 40
    rows = table(folder, found)
    assert len(rows) == 46 and rows["tokens"][6:].tolist() == [1] * 40 and not rows["labels"][6:].any()
    assert "mixtures.M.skip_samples" in said(capsys, folder, models, use(), skip="nobody")


def test_too_few_labels_stop_the_workflow(folder, models, capsys):
    mix(folder)
    """Tokens of pictures are none of text: a short answer to a large picture is no fault."""
    text = said(capsys, folder, models, use(min_supervised_share=0.9))
    found = re.search(r"only (\d+) of (\d+) tokens of text carry a label", text)
    counted = survey(folder, models, use())["layouts"][0]["all"]
    assert [int(number) for number in found.groups()] == [counted["labels"], counted["tokens"] - 6 * 16]
    assert "stages.finetune.min_supervised_share asks for 90.00%" in text


class _Dies:
    """A surveyor whose processes are killed, as for their memory."""

    def __init__(self, store):
        self.store = store

    def measure(self, chunk):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_an_error_and_no_wait(folder, monkeypatch):
    mix(folder)
    monkeypatch.setattr(step, "CHUNK", 7)
    with pytest.raises(UserError, match="was killed, perhaps for its memory"):
        list(step.measured_chunks(_Dies(open_samples(folder.mixture)), 2))
