"""In which precision weights are loaded and kept."""

from __future__ import annotations

from typing import Any

import torch


def load_dtype(training: Any) -> torch.dtype:
    """DeepSpeed keeps float32 copies itself; elsewhere the weights that train stay in float32 under autocast."""
    if training.deepspeed and training.bf16:
        return torch.bfloat16
    if training.deepspeed and training.fp16:
        return torch.float16
    return torch.float32


def half_precision(training: Any) -> torch.dtype | None:
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None


def cast_frozen(model: Any, training: Any) -> None:
    """Halves the memory of what does not train, as LLaVA does for the vision tower."""
    half = half_precision(training)
    if half is None or training.deepspeed or training.fsdp:
        return
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(half)
