"""A digest is of what a training is: another folder, another clock and another attempt give the same one."""

import json
import shutil

import pytest

from tests.support.workspace import Workspace
from workflow_scripts.launch.attempts import read_attempts

pytestmark = pytest.mark.slow

# docs/architecture.md lists it: where a `path` source's files lie is what its manifest is about.
MAY_DIFFER = {"data/sources/questions/manifest.json"}


def manifests(workspace):
    """What every manifest says, by its place in the working folder."""
    folder = workspace.folder
    found = [*folder.glob("data/*/*/manifest.json"), *folder.glob("models/*/manifest.json")]
    found += [*folder.glob("runs/*/*/manifest.json"), *folder.glob("experiments/*/checkpoint.json")]
    return {str(path.relative_to(folder)): json.loads(path.read_text()) for path in found}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The vanilla experiment once more, from nothing, in another folder."""
    workspace = Workspace(tmp_path_factory.mktemp("other") / "deep" / "w").draw()
    workspace.run("experiments/vanilla/checkpoint.json")
    return workspace


def test_two_undisturbed_runs_have_the_same_manifests(finished, elsewhere):
    first, second = manifests(finished), manifests(elsewhere)
    assert {name.split("/")[0] for name in second} == {"data", "models", "runs", "experiments"}
    for name, content in second.items():
        if name in MAY_DIFFER:
            assert first[name] != content and first[name]["digest"] == content["digest"]
        else:
            assert first[name] == content, name
    assert {path.name for path in elsewhere.folder.glob("runs/finetune/*/*/")} <= {
        path.name for path in finished.folder.glob("runs/finetune/*/*/")
    }


def test_a_stage_1_that_is_made_again_trains_no_stage_2_again(elsewhere):
    state, stage_1 = elsewhere.state("finetune", "vanilla"), elsewhere.run_folder("pretrain", "vanilla")
    before = read_attempts(state), manifests(elsewhere)
    shutil.rmtree(stage_1)
    elsewhere.run(str((stage_1 / "manifest.json").relative_to(elsewhere.folder)))
    elsewhere.run("experiments/vanilla/checkpoint.json")
    assert (read_attempts(state), manifests(elsewhere)) == before
    assert elsewhere.planned("experiments/vanilla/checkpoint.json") == []
