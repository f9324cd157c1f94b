"""Configurations at random: each is planned and described, or refused in a message of ours."""

import json

import pytest
import yaml
from hypothesis import strategies as st

from tests.support.fuzzing import changed, tries
from tests.support.workspace import ROOT, SMALL
from workflow_scripts.config.load import load_files
from workflow_scripts.io import UserError
from workflow_scripts.plan.describe import describe_plan
from workflow_scripts.plan.plan import Plan

FULL = {
    name: yaml.safe_load((ROOT / f"config/{name}.yaml").read_text()) for name in ("config", "llava-v1.5-7b")
}
CONFIG = st.sampled_from([*FULL.values(), SMALL]).flatmap(changed)
TEXT = st.sampled_from([(ROOT / f"config/{name}.yaml").read_text() for name in FULL])
JUNK = st.sampled_from(
    ["\t", ":", "- ", "{", "]", "&a", "*a", "!!python/object:os.system", "\0", "<<: ", '"', "\n", "é", "%"]
)


def plan_of(path):
    """All that happens to a configuration before anything runs; None where it is refused."""
    try:
        plan = Plan(load_files([path]))
        return plan, describe_plan(plan)
    except UserError as error:
        assert str(error).strip()
        return None


@tries(60, 120, config=CONFIG)
def test_a_changed_configuration_is_planned_or_refused(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    if planned := plan_of(path):
        plan, text = planned
        assert len(plan.runs) and "trainings" in text
        assert all(run.folder.startswith("runs/") and ".." not in run.folder for run in plan.runs.values())


@tries(40, 80, text=TEXT, junk=st.lists(JUNK, min_size=1, max_size=3), at=st.integers(0, 2**20))
def test_a_damaged_file_is_read_or_named(tmp_path, monkeypatch, text, junk, at):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    for piece in junk:
        at = at % (len(text) + 1)
        text = text[:at] + piece + text[at:]
        at = at * 31 + 7
    path.write_text(text)
    plan_of(path)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe\0", b"# nothing\n", b"[1, 2]", b"3", b"a: &b [*b]", b"? {a: 1}\n: 2"]
)
def test_files_that_are_no_configuration(tmp_path, data):
    path = tmp_path / "config.yaml"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"config.yaml|sources|experiments"):
        load_files([path])
