"""Several real processes give what one process gives on the same global batch: DDP, ZeRO-2, ZeRO-3, FSDP2.

With weight decay, a learning rate of the projector's own and clipping: whatever treats parameters differently
by name or shape must see the whole parameters, however they are split.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_ext.training import states
from llava_ext.training.trainer import LlavaTrainer
from tests.support.disturb import After, Signal
from tests.support.trainings import GOLDEN, TRACED, command_line, losses, result, run, trace_only

pytestmark = pytest.mark.slow
STEPS = 4
SHORT = {
    "max_steps": STEPS,
    "save_steps": 2,
    "group_by_modality_length": None,
    "sampling": "sequential",
    "weight_decay": 0.3,
    "mm_projector_lr": 5e-4,
    "max_grad_norm": 1.0,
}


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
    flags = SHORT | {"data_path": data, "gradient_accumulation_steps": 1} | changes
    return command_line(2, folder / "out", **flags)


def assert_close(ours: Path, theirs: Path, bound=5e-6):
    for mine, other in zip(losses(ours), losses(theirs), strict=True):
        assert mine[0] == other[0] and mine[2] == other[2]
        assert mine[1] == pytest.approx(other[1], abs=bound)
        assert mine[3] == pytest.approx(other[3], rel=1e-4)
    first, second = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert first.keys() == second.keys()
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-4


def test_ddp_with_checkpointing_and_a_signal_to_one_rank_then_one_process(data, alone, tmp_path):
    """All ranks stop after the same step though one got the signal; another number of processes then goes
    on.
    """
    flags = {"gradient_checkpointing": True}
    signalled = After(LlavaTrainer.compute_loss, Signal(signal.SIGUSR1), calls=2, rank=1)
    run(two(data, tmp_path, **flags), tmp_path / "log", processes=2, before=signalled)
    assert result(tmp_path / "out")["status"] == "interrupted" and result(tmp_path / "out")["step"] == 2
    argv = command_line(2, tmp_path / "out", data_path=data, **SHORT | flags)
    assert "saved by 2 processes, now 1" in run(argv, tmp_path / "log")
    assert_close(tmp_path / "out", alone)


def unfinished(finished: Path, folder: Path) -> Path:
    """A copy of a finished training that still has to do its steps 3 and 4."""
    shutil.copytree(finished / "out", folder / "out")
    for name in ("train_result.json", "model.safetensors", "checkpoint-4"):
        path = folder / "out" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def assert_loads_in_stock_transformers(folder: Path):
    from transformers import LlavaForConditionalGeneration

    _, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("config", ["zero2.json", "zero3.json"])
def test_deepspeed(config, data, alone, tmp_path):
    """Equal to one process; loads in stock transformers; goes on with the same bits, and on one process
    within rounding.
    """
    run(two(data, tmp_path, deepspeed=config), tmp_path / "log", processes=2)
    assert_close(tmp_path / "out", alone)
    assert_loads_in_stock_transformers(tmp_path / "out")
    assert not list((tmp_path / "out").glob("checkpoint-*/trained.safetensors")), (
        "DeepSpeed's own files hold the weights"
    )

    again = unfinished(tmp_path, tmp_path / "again")
    assert "checkpoint-2" in run(two(data, again, deepspeed=config), again / "log", processes=2)
    assert losses(again / "out") == losses(tmp_path / "out")
    assert (again / "out/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()

    fewer = unfinished(tmp_path, tmp_path / "fewer")
    text = run(command_line(2, fewer / "out", data_path=data, deepspeed=config, **SHORT), fewer / "log")
    assert "saved by 2 processes, now 1" in text
    assert_close(fewer / "out", alone)
    assert not list((fewer / "out").glob(".saving*"))


LORA = {"lora_enable": True, "lora_merge": False, "lora_r": 4, "lora_dropout": 0.0, "max_steps": 2}


@pytest.fixture(scope="module")
def adapters_alone(data, tmp_path_factory):
    """The adapters that one process trains."""
    folder = tmp_path_factory.mktemp("adapters")
    run(command_line(2, folder / "out", data_path=data, **SHORT | LORA), folder / "log")
    return load_file(folder / "out/adapters/adapter_model.safetensors")


def assert_same_adapters(output_dir, theirs):
    ours = load_file(output_dir / "adapters/adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=0)


def test_zero3_leaves_whole_adapters(data, adapters_alone, tmp_path):
    """ZeRO-3 keeps placeholders without elements where the adapters were."""
    run(two(data, tmp_path, deepspeed="zero3.json", **LORA), tmp_path / "log", processes=2)
    assert_same_adapters(tmp_path / "out", adapters_alone)


def test_compiled_layers_with_ddp_and_adapters(data, adapters_alone, tmp_path):
    compiled = {"fusion": "compile", "checkpoint_layers": 2}
    text = run(two(data, tmp_path, **LORA | compiled), tmp_path / "log", processes=2, before=trace_only)
    assert TRACED in text
    assert_same_adapters(tmp_path / "out", adapters_alone)


def test_compiled_layers_with_zero2(data, alone, tmp_path):
    """Where the gradients are split, the layers are whole."""
    flags = {"deepspeed": "zero2.json", "fusion": "compile"}
    text = run(two(data, tmp_path, **flags), tmp_path / "log", processes=2, before=trace_only)
    assert TRACED in text
    assert_close(tmp_path / "out", alone)


def test_adapters_with_zero3_in_half_precision(data, tmp_path):
    """ZeRO-3 takes one precision only; peft would keep the adapters in float32."""
    lora = {"lora_enable": True, "lora_merge": False, "lora_r": 4, "max_steps": 2}
    run(two(data, tmp_path, deepspeed="zero3.json", bf16=True, **lora), tmp_path / "log", processes=2)
    adapters = load_file(tmp_path / "out/adapters/adapter_model.safetensors")
    assert all(
        tensor.isfinite().all() and tensor.count_nonzero()
        for name, tensor in adapters.items()
        if "lora_B" in name
    )


def test_measured_statistics_come_along_to_another_engine(tmp_path):
    """`auto` measures on the language model as the first engine holds it; the second one rounds it
    otherwise.
    """
    auto = {"normalize_projector": True, "normalize_statistics": "auto", "max_steps": 2, "save_steps": 1}
    first = command_line(
        1, tmp_path / "first", bf16=True, deepspeed="zero2.json", pretrain_mm_mlp_adapter=None, **auto
    )
    run(first, tmp_path / "log")
    argv = command_line(
        2, tmp_path / "out", **auto | {"pretrain_mm_mlp_adapter": tmp_path / "first/mm_projector.bin"}
    )
    run(argv, tmp_path / "log")
    stored = json.loads((tmp_path / "first/config.json").read_text())["spatial_llava"]["interventions"]
    ours = json.loads((tmp_path / "out/config.json").read_text())
    assert ours["projector_max_norm"] == stored["projector_max_norm"]
    assert run(
        [*argv, "--normalize_statistics", "1.5,1.0", "--output_dir", str(tmp_path / "other")],
        tmp_path / "log",
        expect=1,
    ).count("projector_max_norm")


@pytest.fixture(scope="module")
def zero2_alone(data, tmp_path_factory):
    """Flags of ZeRO-2 on one process, and the folder in which it has trained."""
    folder = tmp_path_factory.mktemp("zero2")
    flags = SHORT | {"deepspeed": "zero2.json", "data_path": data}
    run(command_line(2, folder / "out", **flags), folder / "log")
    return flags, folder


def test_deepspeed_on_more_processes(data, alone, zero2_alone, tmp_path):
    """A checkpoint of one process goes on with two."""
    more = unfinished(zero2_alone[1], tmp_path / "more")
    text = run(two(data, more, deepspeed="zero2.json"), more / "log", processes=2)
    assert "2 processes on 1 machines" in text and "saved by 1 processes, now 2" in text
    assert_close(more / "out", alone)


def test_deepspeeds_files_can_not_run_code(zero2_alone, tmp_path):
    """DeepSpeed would unpickle whatever its files name; here they may hold tensors and a few known
    classes.
    """
    flags, finished = zero2_alone
    folder = unfinished(finished, tmp_path / "poisoned")
    checkpoint = folder / "out/checkpoint-2"
    (poisoned,) = checkpoint.glob("global_step2/*_optim_states.pt")
    torch.save({"optimizer_state_dict": Evil(tmp_path / "ran")}, poisoned)
    (checkpoint / states.MARKER).unlink()
    checkpoint.rename(tmp_path / "sealed")
    states.seal(tmp_path / "sealed", checkpoint, 2, world_size=1, engine="deepspeed-zero2")
    argv = command_line(2, folder / "out", **flags)
    text = run(argv, folder / "log", expect=1)
    assert "Weights only load failed" in text
    assert not (tmp_path / "ran").exists()


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_fsdp(data, tmp_path):
    """Splits the weights; stops at a signal and goes on with fewer processes; equal to one process; loads
    in stock transformers.
    """
    small = {"per_device_train_batch_size": 2, "loss_normalization": "token"}
    one = tmp_path / "one"
    one.mkdir()
    run(
        command_line(2, one / "out", data_path=data, gradient_accumulation_steps=4, **SHORT | small),
        one / "log",
    )

    signalled = After(LlavaTrainer.compute_loss, Signal(signal.SIGTERM), calls=2, rank=3)
    run(two(data, tmp_path, fsdp=True, **small), tmp_path / "log", processes=4, before=signalled)
    assert result(tmp_path / "out")["status"] == "interrupted" and result(tmp_path / "out")["step"] == 2
    fewer = two(data, tmp_path, fsdp=True, **small | {"gradient_accumulation_steps": 2})
    assert "saved by 4 processes, now 2" in run(fewer, tmp_path / "log", processes=2)
    assert_close(tmp_path / "out", one / "out")
    assert states.Checkpoint(tmp_path / "out/checkpoint-4", STEPS).facts["engine"] == "fsdp"
    assert_loads_in_stock_transformers(tmp_path / "out")


def test_fsdp_with_a_frozen_projector(data, tmp_path):
    """A batch of texts on one rank alone does not wait for the other, which gathers the tower's weights."""
    argv = two(data, tmp_path, fsdp=True, freeze_mm_mlp_adapter=True, mm_projector_lr=None, max_steps=3)
    run(argv, tmp_path / "log", processes=2)
    assert result(tmp_path / "out")["step"] == 3
