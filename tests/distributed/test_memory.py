"""What weights, gradients and optimizer need on each GPU, and the refusal of what can't fit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava_ext.distributed import memory
from llava_ext.distributed.estimate import Layout
from llava_ext.distributed.memory import layout
from llava_ext.errors import TrainingError
from llava_ext.training.llava_flags import deepspeed_config


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
    assert layout(training()) == Layout(frozen=2, cast=2, at_step=4)
    assert layout(training(optim="adamw_torch_fused")) == Layout(frozen=2, cast=2)
    assert layout(training(bf16=False)) == Layout(at_step=4)
    assert layout(training(fsdp=True)) == Layout(split=3, parts=8, at_step=4)
    assert layout(training(fsdp=True, fsdp_config={"cpu_offload": True})).bytes(1e9, 1e9) == 0


def test_what_is_not_known_counts_as_nothing():
    assert layout(training(optim="adafactor")) == Layout(frozen=2, moments=0, cast=2)
    for changes, moments, master, at_step in (
        ({}, 8, 4, 8),
        ({"optimizer": {"type": "AdamW"}}, 8, 4, 4),
        ({"optimizer": {"type": "Lion"}}, 0, 4, 4),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, 0, 0, 4),
    ):
        config = {"zero_optimization": {"stage": 2}, **changes}
        found = layout(training(deepspeed=config, hf_deepspeed_config=SimpleNamespace(config=config)))
        assert (found.moments, found.master, found.at_step) == (moments, master, at_step)


def test_what_can_not_fit_is_refused_with_both_numbers_and_a_remedy():
    model = torch.nn.Linear(1024, 1024, bias=False)
    memory.check(model, training(), room=20 * 2**20)
    with pytest.raises(TrainingError, match=rf"need {20 / 1024:.1f} GiB on each GPU.*zero3\.json"):
        memory.check(model, training(), room=20 * 2**20 - 1)
