"""Only what is invalidated runs again: docs/reruns.md, row by row, by dry runs of the real Snakefile."""

import shutil

import pytest

from tests.support.rerun_rows import RERUN_NOTHING, RERUN_SOMETHING, check_raised_version, check_row
from tests.support.workspace import ROOT, copy_code

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("row", RERUN_SOMETHING)
def test_what_runs_again(finished, tmp_path, row):
    check_row(finished, tmp_path, row)


def test_what_runs_nothing_again_does_not_so_together(finished, tmp_path):
    check_row(finished, tmp_path, *RERUN_NOTHING)


def test_a_higher_code_version_makes_all_trainings_new(finished, tmp_path):
    check_raised_version(finished, tmp_path)


def test_a_survey_that_is_made_again_hides_no_training(finished, tmp_path):
    """Without the report among the targets nothing else asks for what is missing."""
    workspace = finished.copy_to(tmp_path / "w")
    workspace.config["experiments"] = {"long": {"finetune": {"max_steps": 60}}}  # another layout is left out
    planned = {line.split(":")[0] for line in workspace.planned("experiments/long/checkpoint.json")}
    assert planned == {"survey", "finetune", "export", "checkpoint"}


def test_a_moved_clone_and_working_folder_rerun_nothing(finished, tmp_path):
    workspace = finished.copy_to(tmp_path / "elsewhere" / "w", copy_code(tmp_path / "clone"))
    assert workspace.planned() == []
    link = workspace.folder / "experiments/vanilla/hf/config.json"
    assert link.is_file()
    assert workspace.folder in link.resolve().parents


def test_another_profile_reruns_nothing(finished, tmp_path):
    workspace = finished.copy_to(tmp_path / "w")
    workspace.options = ["--profile", str(ROOT / "slurm")]
    assert workspace.planned() == []


def test_going_back_to_a_former_value_uses_the_former_run(finished, tmp_path):
    workspace = finished.copy_to(tmp_path / "w")
    before = workspace.config["experiments"]["gentle"]["finetune"]["learning_rate"]
    workspace.config["experiments"]["gentle"]["finetune"]["learning_rate"] = 7e-3
    assert any(line.startswith("finetune:") for line in workspace.planned())
    workspace.config["experiments"]["gentle"]["finetune"]["learning_rate"] = before
    assert workspace.planned() == []


def test_a_deleted_training_state_costs_nothing_while_its_manifest_is_there(finished, tmp_path):
    workspace = finished.copy_to(tmp_path / "w")
    for path in workspace.folder.glob("runs/*/*/*/checkpoint-*"):
        shutil.rmtree(path)
    assert workspace.planned() == []
