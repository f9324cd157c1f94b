"""Checkpoints that were not trained here: prepared, given an export's form, and asked like any other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from llava_ext.convert import convert
from tests.support.servers import HubServer
from tests.support.workspace import ROOT
from workflow_scripts.config.evaluation import TaskSpec
from workflow_scripts.config.models import PathModel
from workflow_scripts.evaluate.predict import predict
from workflow_scripts.export.adopt import adopt
from workflow_scripts.export.step import main
from workflow_scripts.io import UserError, read_json
from workflow_scripts.prepare_model.step import prepare


def prepared(folder, home, **changes):
    """The manifest of a checkpoint of the user's, as the step before makes it."""
    manifest = home / "models" / "theirs" / "manifest.json"
    prepare("theirs", PathModel(kind="path", role="checkpoint", path=str(folder), **changes), manifest)
    return manifest


def adopted(folder, home):
    manifest = home / "runs" / "export" / "theirs-1" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    adopt([prepared(folder, home)], manifest)
    return manifest


def answers(export, held_out, home):
    spec = TaskSpec.model_validate({"source": "shapes_test", "pictures": 3, "max_new_tokens": 4})
    manifest = home / "p" / "manifest.json"
    found = predict("shapes", spec, export, held_out[1], manifest)
    rows = pd.read_parquet(manifest.parent / found["folder"] / "predictions.parquet")
    return rows[["question", "condition", "seed", "prompt_digest", "answer"]]


def hf_of(export):
    return export.parent / read_json(export)["folders"]["hf"]


def changed(export, tmp_path, name, change):
    """A copy of the HF folder with one JSON file changed."""
    folder = tmp_path / "theirs"
    shutil.copytree(hf_of(export), folder)
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    return folder


def test_a_stock_checkpoint_answers_as_where_it_comes_from(stock_export, held_out, tmp_path):
    export = adopted(hf_of(stock_export), tmp_path)
    found = read_json(export)
    assert found["interventions"] == {} and found["origin"] == {"path": str(hf_of(stock_export))}
    weights = hf_of(export) / "model.safetensors"
    assert weights.stat().st_ino == (hf_of(stock_export) / "model.safetensors").stat().st_ino
    before = answers(stock_export, held_out, tmp_path / "before")
    pd.testing.assert_frame_equal(answers(export, held_out, tmp_path / "after"), before)


def test_saved_code_is_written_anew_and_never_run(compressed_export, held_out, tmp_path):
    theirs = tmp_path / "theirs"
    shutil.copytree(hf_of(compressed_export), theirs)
    for path in theirs.glob("*.py"):
        path.write_text("raise SystemExit('code of others was run')\n")
    export = adopted(theirs, tmp_path)
    flags = read_json(export)["interventions"]
    assert flags["final_spatial_size"] == 4 and flags["normalize_projector"] is True
    before = answers(compressed_export, held_out, tmp_path / "before")
    pd.testing.assert_frame_equal(answers(export, held_out, tmp_path / "after"), before)


def test_the_original_layout_is_converted_with_its_tower(stock_export, tower, held_out, tmp_path):
    convert(hf_of(stock_export), tmp_path / "original", "llava", vision_tower="not/here")
    checkpoint = prepared(tmp_path / "original", tmp_path, layout="llava")
    clip = tmp_path / "models" / "clip" / "manifest.json"
    prepare("clip", PathModel(kind="path", role="vision_tower", path=str(tower)), clip)
    export = tmp_path / "runs" / "export" / "theirs-1" / "manifest.json"
    export.parent.mkdir(parents=True)
    main(["--spec", "{}", "--models", str(checkpoint), str(clip), "--manifest", str(export)])
    before = answers(stock_export, held_out, tmp_path / "before")
    pd.testing.assert_frame_equal(answers(export, held_out, tmp_path / "after"), before)


@pytest.mark.slow
def test_a_repository_of_the_hub_is_fetched_at_its_commit(stock_export, held_out, tmp_path):
    manifest = tmp_path / "models" / "theirs" / "manifest.json"
    export = tmp_path / "runs" / "export" / "theirs-1" / "manifest.json"
    export.parent.mkdir(parents=True)
    with HubServer("llava-hf/tiny", "model").running() as hub:
        for path in hf_of(stock_export).iterdir():
            if path.is_file():
                hub.put(path.name, path.read_bytes(), lfs=path.suffix == ".safetensors")
        spec = {"kind": "hub", "role": "checkpoint", "repo": hub.repo, "revision": hub.commit}
        command = [sys.executable, "-m", "workflow_scripts.prepare_model", "--name", "theirs"]
        command += ["--spec", json.dumps(spec), "--manifest", str(manifest)]
        found = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(command, env=found, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        origin = {"repo": hub.repo, "revision": hub.commit}
    adopt([manifest], export)
    assert read_json(export)["origin"] == origin
    before = answers(stock_export, held_out, tmp_path / "before")
    pd.testing.assert_frame_equal(answers(export, held_out, tmp_path / "after"), before)


# ---- what is refused ----


def test_another_kind_of_model_is_named_with_what_is_allowed(stock_export, tmp_path):
    folder = changed(
        stock_export, tmp_path, "config.json", lambda found: found.update(model_type="llava_next")
    )
    with pytest.raises(UserError, match="model_type 'llava_next'; allowed with layout: hf"):
        prepared(folder, tmp_path)


def test_adapters_are_no_whole_checkpoint(stock_export, tmp_path):
    folder = changed(stock_export, tmp_path, "config.json", lambda found: None)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"merge them first with `python -m llava_ext.convert"):
        prepared(folder, tmp_path)


def test_without_a_chat_template_nothing_is_guessed(stock_export, tmp_path):
    folder = changed(stock_export, tmp_path, "config.json", lambda found: None)
    for path in folder.glob("chat_template*"):
        path.unlink()
    for name in ("processor_config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        content.pop("chat_template", None)
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"its processor can't be used .* and a chat template"):
        adopted(folder, tmp_path)


def test_a_template_that_shows_no_picture_is_refused(stock_export, tmp_path):
    folder = changed(stock_export, tmp_path, "config.json", lambda found: None)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'][1]['text'] }}")
    with pytest.raises(UserError, match=r"its chat template makes 'What is it\?' of a picture"):
        adopted(folder, tmp_path)


def test_weights_that_changed_after_they_were_prepared_are_refused(stock_export, tmp_path):
    folder = changed(stock_export, tmp_path, "config.json", lambda found: None)
    manifest = prepared(folder, tmp_path)
    path = manifest.parent / "model" / "config.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match="has changed since it was prepared; delete"):
        adopt([manifest], tmp_path / "export" / "manifest.json")
