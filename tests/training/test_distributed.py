"""Several real processes give what one process gives on the same global batch: DDP, ZeRO-2, ZeRO-3, FSDP2."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file
from trainings import GOLDEN, command_line, losses, result, rows, run, start, wait_for

pytestmark = pytest.mark.slow
STEPS = 4
SHORT = {"max_steps": STEPS, "save_steps": 2, "group_by_modality_length": None, "sampling": "sequential"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Stage-2 samples in an order that gives the second process a batch of texts in steps 2 and 3."""
    records = json.loads((GOLDEN / "train" / "stage2.json").read_text())
    pictures = [record for record in records if "image" in record]
    texts = [record for record in records if "image" not in record]
    ordered = pictures[:12] + texts[:4] + pictures[12:16] + texts[4:8] + pictures[16:32]
    path = tmp_path_factory.mktemp("data") / "samples.json"
    path.write_text(json.dumps(ordered))
    return path


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """One process, two micro-batches a step."""
    folder = tmp_path_factory.mktemp("alone")
    run(command_line(2, folder / "out", data_path=data, **SHORT), folder / "log")
    return folder / "out"


def two(data, folder, **changes):
    """The flags of two processes with one micro-batch each."""
    return command_line(2, folder / "out", data_path=data, gradient_accumulation_steps=1, **SHORT | changes)


def assert_close(ours: Path, theirs: Path, bound=5e-6):
    for mine, other in zip(losses(ours), losses(theirs), strict=True):
        assert mine[0] == other[0] and mine[2] == other[2]
        assert mine[1] == pytest.approx(other[1], abs=bound)
        assert mine[3] == pytest.approx(other[3], rel=1e-4)
    first, second = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert first.keys() == second.keys()
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-4


def workers(agent: int) -> list[int]:
    """The training processes below a torchrun."""
    return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]


def test_ddp_with_checkpointing_and_a_signal_to_one_rank_then_one_process(data, alone, tmp_path):
    """All ranks stop after the same step though one got the signal; another number of processes then goes on."""
    argv = two(data, tmp_path, gradient_checkpointing=True)
    process = start(argv, tmp_path / "log", processes=2)
    wait_for(lambda: len(rows(tmp_path / "out")) >= 1, process)
    os.kill(workers(process.pid)[-1], signal.SIGUSR1)
    assert process.wait(60) == 0
    stopped = result(tmp_path / "out")
    assert stopped["status"] == "interrupted" and stopped["step"] < STEPS
    argv = command_line(2, tmp_path / "out", data_path=data, gradient_checkpointing=True, **SHORT)
    assert "saved by 2 processes, now 1" in run(argv, tmp_path / "log")
    assert_close(tmp_path / "out", alone)


@pytest.mark.parametrize("config", ["zero2.json", "zero3.json"])
def test_deepspeed(config, data, alone, tmp_path):
    """Equal to one process; loads in stock transformers; goes on from a checkpoint with the same bits; refuses fewer processes."""
    argv = two(data, tmp_path, deepspeed=config, max_grad_norm=1.0)
    run(argv, tmp_path / "log", processes=2)
    assert_close(tmp_path / "out", alone)
    from transformers import LlavaForConditionalGeneration

    _, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "out", again / "out")
    for name in ("train_result.json", "model.safetensors", "checkpoint-4"):
        path = again / "out" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if config == "zero2.json":
        few = command_line(2, again / "out", data_path=data, deepspeed=config, max_grad_norm=1.0, **SHORT)
        assert "there are 1 now" in run(few, again / "log", expect=1)
    assert "checkpoint-2" in run(
        two(data, again, deepspeed=config, max_grad_norm=1.0), again / "log", processes=2
    )
    assert losses(again / "out") == losses(tmp_path / "out")
    assert (again / "out/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_fsdp(data, alone, tmp_path):
    """Splits the weights; stops at a signal and goes on; equal to one process; loads in stock transformers."""
    from transformers import LlavaForConditionalGeneration

    from llava_ext import resume

    argv = two(data, tmp_path, fsdp=True)
    process = start(argv, tmp_path / "log", processes=2)
    wait_for(lambda: len(rows(tmp_path / "out")) >= 1, process)
    os.kill(workers(process.pid)[-1], signal.SIGTERM)
    assert process.wait(60) == 0
    stopped = result(tmp_path / "out")
    assert stopped["status"] == "interrupted" and stopped["step"] < STEPS
    run(argv, tmp_path / "log", processes=2)
    assert_close(tmp_path / "out", alone)
    assert resume.Checkpoint(tmp_path / "out/checkpoint-4", STEPS).facts["engine"] == "fsdp"
    _, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


def test_fsdp_with_a_frozen_projector(data, tmp_path):
    """A batch of texts on one rank alone does not wait for the other, which gathers the tower's weights."""
    argv = two(data, tmp_path, fsdp=True, freeze_mm_mlp_adapter=True, max_steps=3)
    run(argv, tmp_path / "log", processes=2, timeout=100)
    assert result(tmp_path / "out")["step"] == 3
