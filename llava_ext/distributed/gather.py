"""Parameters that are split over ranks, whole: ZeRO-3's partitions and FSDP's sharded tensors."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


def whole(*parameters: Any, write: bool = False) -> AbstractContextManager[Any]:
    """A context in which parameters that ZeRO-3 has partitioned are whole. Every rank must enter it.

    Args:
        write: rank 0's values of that time become everyone's when it ends.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None)


def gather(model: nn.Module, names: set[str], keep: bool) -> dict[str, torch.Tensor]:
    """Copies of parameters on the CPU, whole, whatever splits them. Every rank must call; those with
    ``keep`` get them.
    """
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if name not in names:
            continue
        with whole(parameter):
            tensor: Any = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            if keep:
                found[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return found


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape; of one that ZeRO-3 has partitioned, not that of the part."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Number of scalars, ZeRO-3's partitioned parameters counted whole."""
    return sum(getattr(parameter, "ds_numel", None) or parameter.numel() for parameter in parameters)
