"""Several processes for one training, chosen by `compute` alone: same global batch, same losses."""

import os
import signal

import pytest

from tests.support.finished import attempts, losses, with_long
from tests.support.held import PATIENCE_S, hold, wait_until_held
from tests.support.workspace import wait_for

pytestmark = pytest.mark.slow
TARGET = "runs/finetune/{}/manifest.json"


def training(finished, folder, compute=(), **stage):
    workspace = finished.copy_to(folder)
    workspace.config["compute"]["small"].update({"per_device_batch_size": 4, **dict(compute)})
    recipe = {"max_steps": 12, "save_steps": 4, "loss_normalization": "token", **stage}
    workspace.config["experiments"]["long"] = {"finetune": recipe}
    return workspace


def finish(workspace, *arguments):
    run = workspace.plan().run("finetune", "long")
    workspace.run(run.manifest, *arguments)
    return losses(workspace.state("finetune", "long"))


@pytest.fixture(scope="module")
def one_process(finished, tmp_path_factory):
    """The losses of one process that accumulates two micro-batches."""
    return finish(training(finished, tmp_path_factory.mktemp("one") / "w"))


@pytest.mark.parametrize("parallel", ["ddp", "zero2", "zero3", "fsdp"])
def test_two_processes_give_the_losses_of_one(finished, one_process, tmp_path, parallel):
    workspace = training(finished, tmp_path / "w", {"processes_per_node": 2, "parallel": parallel})
    assert finish(workspace) == pytest.approx(one_process, abs=1e-4)
    state = workspace.state("finetune", "long")
    assert "Traceback" not in (state / "logs/attempt-001.log").read_text()
    assert (state / "model.safetensors").is_file()


def test_a_run_continues_with_another_number_of_processes(finished, straight, tmp_path):
    workspace = with_long(finished, tmp_path / "w")
    hold(workspace, 4)
    run = workspace.plan().run("finetune", "long")
    process = workspace.start(run.manifest)
    state = wait_until_held(workspace, process)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=PATIENCE_S)
    wait_for(lambda: not (state / "owner.json").exists(), PATIENCE_S, "the launcher's end")
    saved = attempts(state)[-1]["to_step"]
    assert saved == 5

    workspace.config["compute"]["small"].update(processes_per_node=2, parallel="ddp", per_device_batch_size=4)
    assert workspace.plan().run("finetune", "long") == run, (
        "the number of processes does not make another run"
    )
    found = finish(workspace)
    assert attempts(state)[-1]["from_step"] == saved
    assert found == pytest.approx(straight[0], abs=1e-3)
