"""The register of kinds of source is the only list: a section, a function and an entry are a new kind."""

import json
import subprocess
import sys

import pytest
import yaml

from tests.support.workspace import ROOT, copy_code
from workflow_scripts.io import read_json
from workflow_scripts.sources import KINDS

KIND = '''
class OneRecord(Source):
    """A record without a picture."""

    kind: Literal["one_record"] = "one_record"
    text: str
    """What is said."""


def _write(spec: OneRecord, folder: Path) -> dict[str, Any]:
    import json
    from workflow_scripts.acquire.local_files import describe_file

    turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": spec.text}]
    path = folder / "one.json"
    path.write_text(json.dumps([{"id": "1", "conversations": turns}]))
    annotations = [{"path": path.name, "role": "annotations"}]
    return {"annotations": annotations, "files": [describe_file(path, path.name)]}


KINDS = {
'''


@pytest.fixture
def code(tmp_path):
    """A copy of the code with one more kind of source, written into the register alone."""
    folder = copy_code(tmp_path / "code")
    path = folder / "workflow_scripts/sources.py"
    text = (
        path.read_text().replace("\nKINDS = {\n", KIND).replace("Annotated, Any", "Annotated, Any, Literal")
    )
    path.write_text(
        text.replace(
            "        SourceKind(PathSource",
            "        SourceKind(OneRecord, _write),\n        SourceKind(PathSource",
        )
    )
    return folder


def python(code, *arguments, cwd):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={"PYTHONPATH": str(code), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_entry_is_read_planned_and_made(code, tmp_path):
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    config["sources"]["hello"] = {"kind": "one_record", "text": "hello"}
    [mixture] = [config["mixtures"][config["stages"]["finetune"]["mixture"]]]
    mixture["parts"].append({"annotations": "hello"})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    done = python(code, "-m", "workflow_scripts.plan", "--configfile", "c.yaml", cwd=tmp_path)
    assert "Nothing is fetched" in done.stdout, done.stderr
    manifest = tmp_path / "data/sources/hello/manifest.json"
    spec = json.dumps(config["sources"]["hello"])
    arguments = ("--name", "hello", "--spec", spec, "--manifest", str(manifest))
    done = python(code, "-m", "workflow_scripts.acquire", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_json(manifest)["kind"] == "one_record"
    assert read_json(manifest.with_name("one.json"))[0]["conversations"][1]["value"] == "hello"


def test_the_message_about_an_unknown_kind_lists_the_register(code, tmp_path):
    (tmp_path / "c.yaml").write_text("sources: {x: {kind: one_rekord}}")
    done = python(code, "-m", "workflow_scripts.plan", "--configfile", "c.yaml", cwd=tmp_path)
    names = ", ".join(["hub", "url", "one_record", "path", "shapes", "two_d_shapes"])
    assert f"found 'one_rekord'; allowed: one of {names}; fix: did you mean 'one_record'?" in done.stderr


def test_every_kind_explains_its_section():
    for name, kind in KINDS.items():
        assert kind.name == name
        assert kind.spec.__doc__
