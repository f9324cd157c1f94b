"""The optimizer in the CPU's memory: the same numbers, the same bits after an interruption, no start that
hangs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from llava_ext import patches
from llava_ext.distributed import offload
from tests.support.trainings import REPOSITORY, environment, losses, run

from .test_distributed import (  # the same data and settings
    alone,
    assert_close,
    assert_loads_in_stock_transformers,
    data,
    two,
    unfinished,
)

__all__ = ["alone", "data"]  # fixtures
pytestmark = pytest.mark.slow
compiled = pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed's CPU Adam needs a C++ compiler")


def build(timeout: float) -> None:
    script = "from llava_ext.distributed import offload; offload.build_cpu_adam()"
    command = [sys.executable, "-c", script]
    subprocess.run(command, cwd=REPOSITORY, env=environment(), check=True, timeout=timeout)


@pytest.fixture(scope="module")
def built():
    """The compiler takes two and a half minutes of one core, far more on a machine that does other things."""
    build(timeout=2400)


@compiled
@pytest.mark.parametrize("config", ["zero2_offload.json", "zero3_offload.json"])
def test_two_processes(config, built, data, alone, tmp_path):
    """Equal to one process without offload; goes on with the same bits."""
    run(two(data, tmp_path, deepspeed=config), tmp_path / "log", processes=2)
    assert_close(tmp_path / "out", alone, bound=2e-5)
    assert_loads_in_stock_transformers(tmp_path / "out")
    again = unfinished(tmp_path, tmp_path / "again")
    other = two(data, again, deepspeed=config.replace("_offload", ""))
    assert "-offload, this run uses deepspeed-zero" in run(other, again / "log", processes=2, expect=1)
    assert "checkpoint-2" in run(two(data, again, deepspeed=config), again / "log", processes=2)
    assert losses(again / "out") == losses(tmp_path / "out")
    assert (again / "out/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


@compiled
@pytest.mark.parametrize("replay", [True, False])
def test_replayed_steps_give_the_bits_of_steps_that_were_done(built, replay):
    """40 steps in one go, and 20 steps, a new optimizer with the old state, 20 steps."""
    offload.build_cpu_adam()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    def steps(weights, optimizer, numbers):
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            weights.grad = torch.randn(weights.shape, generator=generator)
            optimizer.step()

    def make(weights):
        return DeepSpeedCPUAdam([weights], lr=1e-2, betas=(0.95, 0.999))

    whole = torch.nn.Parameter(torch.ones(64))
    steps(whole, make(whole), range(40))

    parts = torch.nn.Parameter(torch.ones(64))
    first = make(parts)
    steps(parts, first, range(20))
    second = make(parts)
    second.load_state_dict(first.state_dict())
    if replay:
        patches.replay_steps(second)
    steps(parts, second, range(20, 40))
    assert torch.equal(whole, parts) == replay


@compiled
def test_a_lock_that_a_killed_build_left_does_not_hang_the_next(built):
    """torch waits for its lock for ever; ours goes with the process that held it."""
    lock = offload.extensions_folder() / "cpu_adam" / "lock"
    lock.touch()
    build(timeout=300)
    assert not lock.exists()


def test_without_a_compiler_the_message_says_what_is_needed(tmp_path):
    script = "from llava_ext.distributed import offload; offload.build_cpu_adam()"
    changes = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "/nowhere/c++", "PATH": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "NoVerdict: offload: DeepSpeed's CPU Adam can't be compiled" in done.stderr
    assert "It needs a C++ compiler, Python's headers and ninja" in done.stderr


def test_the_folder_is_one_for_each_kind_of_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = offload.extensions_folder()
    assert folder.parent == tmp_path / "llava_ext" and torch.__version__ in folder.name
    monkeypatch.setattr(offload, "_processor", lambda: "another")
    assert offload.extensions_folder() != folder


def test_which_configurations_offload():
    assert not offload.offloads_optimizer({"zero_optimization": {"stage": 2}})
    assert not offload.offloads_optimizer({"zero_optimization": {"offload_optimizer": {"device": "none"}}})
    assert offload.offloads_optimizer({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
