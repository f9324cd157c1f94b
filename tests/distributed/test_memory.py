"""What weights, gradients and optimizer need on each GPU, and the refusal of what can't fit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava_ext.distributed import memory
from llava_ext.distributed.memory import Layout, layout
from llava_ext.errors import TrainingError
from llava_ext.training.llava_flags import deepspeed_config

LLAVA_7B, TOWER = 6.76e9, 0.3e9


def test_llava_7b_by_engine():
    """In 10^9 bytes, by hand: 16 bytes a weight in float32; in half precision 2 + 2 and 12 for the
    optimizer.
    """
    ddp = Layout(frozen=2)
    zero2 = Layout(split=2, parts=8, weight=2, frozen=2, master=4)
    zero3 = Layout(split=3, parts=8, weight=2, frozen=2, master=4)
    needed = [found.bytes(LLAVA_7B, TOWER) / 1e9 for found in (ddp, zero2, zero3)]
    assert needed == pytest.approx([108.8, 14.1 + 11.8, 13.6], abs=0.1)


def test_offload_leaves_the_optimizer_to_the_cpu():
    half = {"parts": 8, "weight": 2, "frozen": 2, "master": 4}
    assert Layout(split=2, offload="optimizer", **half).bytes(8e9, 0) == 16e9
    assert Layout(split=3, offload="optimizer", **half).bytes(8e9, 0) == 2e9
    assert Layout(split=3, offload="parameters", **half).bytes(8e9, 0) == 0


def training(**changes):
    values = {"bf16": True, "fp16": False, "world_size": 8, "deepspeed": None, "fsdp": False}
    values |= {"fsdp_config": None, "optim": "adamw_torch"}
    return SimpleNamespace(**values | changes)


@pytest.mark.parametrize(
    ("name", "split", "offload"),
    [("zero2", 2, "none"), ("zero3", 3, "none"), ("zero3_offload", 3, "parameters")],
)
def test_layouts_of_the_shipped_files(name, split, offload):
    config = SimpleNamespace(config=json.loads(Path(deepspeed_config(f"{name}.json", [])).read_text()))
    found = layout(training(deepspeed=config.config, hf_deepspeed_config=config))
    assert (found.split, found.parts, found.offload, found.weight, found.master) == (split, 8, offload, 2, 4)


def test_layouts_without_deepspeed():
    assert layout(training()) == Layout(frozen=2)
    assert layout(training(fsdp=True)) == Layout(split=3, parts=8)
    assert layout(training(fsdp=True, fsdp_config={"cpu_offload": True})).bytes(1e9, 1e9) == 0


def test_what_is_not_known_counts_as_nothing():
    assert layout(training(optim="adafactor")) == Layout(frozen=2, moments=0)
    for changes, moments, master in (
        ({"optimizer": {"type": "AdamW"}}, 8, 4),
        ({"optimizer": {"type": "Lion"}}, 0, 4),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, 0, 0),
    ):
        config = {"zero_optimization": {"stage": 2}, **changes}
        found = layout(training(deepspeed=config, hf_deepspeed_config=SimpleNamespace(config=config)))
        assert (found.moments, found.master) == (moments, master)


def test_what_can_not_fit_is_refused_with_both_numbers_and_a_remedy():
    model = torch.nn.Linear(1024, 1024, bias=False)
    memory.check(model, training(), room=16 * 2**20)
    with pytest.raises(TrainingError, match=rf"need {16 / 1024:.1f} GiB on each GPU.*zero3\.json"):
        memory.check(model, training(), room=16 * 2**20 - 1)
