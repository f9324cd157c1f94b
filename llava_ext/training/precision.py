"""In which precision weights are loaded and kept."""

from __future__ import annotations

from typing import Any

import torch

from .optimizer import TOWER, component


def load_dtype(training: Any) -> torch.dtype:
    """DeepSpeed keeps float32 copies itself; elsewhere the weights that train stay in float32 under
    autocast.
    """
    if training.deepspeed and training.bf16:
        return torch.bfloat16
    if training.deepspeed and training.fp16:
        return torch.float16
    return torch.float32


def half_precision(training: Any) -> torch.dtype | None:
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None


def cast_frozen(model: Any, training: Any) -> None:
    """Halves the memory of what does not train, as LLaVA does for the vision tower.

    A tower of which some layers train stays whole in float32: on the CPU norms take one precision only.
    """
    half = half_precision(training)
    if half is None or training.deepspeed or training.fsdp:
        return
    named = list(model.named_parameters())
    tower_trains = any(item.requires_grad for name, item in named if component(name) == TOWER)
    for name, parameter in named:
        if not parameter.requires_grad and not (tower_trains and component(name) == TOWER):
            parameter.data = parameter.data.to(half)
