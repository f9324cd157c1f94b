"""A digest is of what a training is: another attempt gives the same one. That another folder and another
clock do is seen where all of it runs on Slurm (tests/slurm/test_slurm.py).
"""

import shutil

import pytest

from tests.support.finished import manifests
from workflow_scripts.launch.attempts import read_attempts

pytestmark = pytest.mark.slow


def test_a_stage_1_that_is_made_again_trains_no_stage_2_again(finished, tmp_path):
    workspace = finished.copy_to(tmp_path / "w")
    state, stage_1 = workspace.state("finetune", "vanilla"), workspace.run_folder("pretrain", "vanilla")
    before = read_attempts(state), manifests(workspace)
    shutil.rmtree(stage_1)
    workspace.run(str((stage_1 / "manifest.json").relative_to(workspace.folder)))
    workspace.run("experiments/vanilla/checkpoint.json")
    assert (read_attempts(state), manifests(workspace)) == before
    assert workspace.planned("experiments/vanilla/checkpoint.json") == []
