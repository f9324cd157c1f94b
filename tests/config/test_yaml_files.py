"""Configuration files mean what they look like, or are refused with file, line and fix."""

import subprocess
import sys

import pytest
import yaml

from tests.support.workspace import ROOT
from workflow_scripts.config.load import load_files
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.io import UserError

DEMO = ROOT / "config/config.yaml"

REFUSED = [
    ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "line 5: the key 'c' stands already in line 3; remove one"),
    ("a: 1\n'a': 2\n", "line 2: the key 'a' stands already in line 1"),
    ("a: {b: 1, b: 1}\n", "line 1: the key 'b' stands already in line 1"),
    ("a: [\n", "line 2: not valid YAML"),
    ("a: 1\n b: 2\n", "line 2: not valid YAML"),
    ("a:\n\tb: 1\n", "line 2: not valid YAML"),
    ("a: &x [*y]\n", "line 1: not valid YAML: found undefined alias"),
    ("mode: 0600\n", "line 1: found 0600, but YAML reads it as an octal number; write it without the 0"),
    ("a: [1, 010]\n", "line 1: found 010"),
    ("time: 1:30\n", "line 1: found 1:30, but YAML reads it as a number in base 60"),
    ("time: 1:30.5\n", "line 1: found 1:30.5, but YAML reads it as a number in base 60"),
    ("experiments:\n  no: {}\n", "line 2: found no, but YAML reads it as true or false"),
    (
        "source: on\n",
        "line 1: found on, but YAML reads it as true or false; write that, or put a name in quotes",
    ),
    ("revision: 2024-01-31\n", "line 1: found 2024-01-31, but YAML reads it as a date; put it in quotes"),
    ("- 1\n", "found list; allowed: the sections of docs/config.md"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_what_reads_differently_from_what_it_looks_like_is_refused(tmp_path, text, message):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert f"{path}" in str(caught.value) and message in str(caught.value)
    assert str(caught.value).count(str(path)) == 1  # one problem, said once


def test_everything_that_is_wrong_comes_in_one_message(tmp_path):
    (tmp_path / "my.yaml").write_text("a: on\nb: 0600\na: 1\n")
    with pytest.raises(UserError) as caught:
        read_yaml(tmp_path / "my.yaml")
    assert str(caught.value).count("my.yaml, line") == 3


def test_what_means_what_it_looks_like_is_read_as_ever(tmp_path):
    """Also what other programs write: JSON, anchors used twice, merged sections, numbers in any spelling."""
    text = (
        "a: &x {b: 1, c: true}\nd: *x\ne: {<<: *x, b: 2}\nf: ['0600', 'no', \"on\"]\ng: [0, 0.5, -1.0e-3,"
        " 1_000, null, ~]\n"
    )
    (tmp_path / "my.yaml").write_text(text)
    assert read_yaml(tmp_path / "my.yaml") == yaml.safe_load(text)
    (tmp_path / "my.json").write_text('{"a": [1, 2.5e-3],\n "b": {"c": "no"}}')
    assert read_yaml(tmp_path / "my.json") == {"a": [1, 0.0025], "b": {"c": "no"}}
    (tmp_path / "empty.yaml").write_text("")
    assert read_yaml(tmp_path / "empty.yaml") == {}
    for path in sorted((ROOT / "config").glob("*.yaml")):
        assert read_yaml(path) == yaml.safe_load(path.read_text())


def test_a_rate_without_a_point_is_the_number_that_it_looks_like(tmp_path):
    """YAML reads 2e-5 as a text; the configuration knows that a number is needed."""
    more = tmp_path / "more.yaml"
    more.write_text("stages: {finetune: {learning_rate: 2e-5}}\n")
    found = load_files([DEMO, more]).config.stages.finetune.learning_rate
    assert found == 2e-5


def test_the_python_and_the_c_parser_see_the_same(tmp_path, monkeypatch):
    from workflow_scripts.config import yaml_files

    monkeypatch.setattr(yaml_files, "Loader", yaml.SafeLoader)
    (tmp_path / "my.yaml").write_text("a: on\nb: 0600\nc: 'on'\nc: 1\n")
    with pytest.raises(UserError) as caught:
        read_yaml(tmp_path / "my.yaml")
    assert str(caught.value).count("my.yaml, line") == 3


def test_snakemake_refuses_a_key_that_stands_twice(tmp_path):
    """Snakemake reads the file itself and takes the later one without a word."""
    text = DEMO.read_text() + "\nmodel: {llm: tiny_llm, vision_tower: tiny_tower}\n"
    (tmp_path / "twice.yaml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "-n", "--configfile", "twice.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    output = done.stdout + done.stderr
    assert "twice.yaml, line" in output and "the key 'model' stands already in line" in output
    assert "Traceback" not in output
