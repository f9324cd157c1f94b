"""What a training takes on each GPU whatever its batch, so that an impossible layout is refused before it
starts.

Weights, gradients, Adam's two moments and what its step makes; activations come on top and depend on the
batch (:mod:`llava_ext.distributed.estimate`). Always the least that is needed: what is not known (another
optimizer's state, where an offload keeps its gradients) counts as nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import TrainingError
from .estimate import FLOAT32, GIB, Layout, layout_of
from .gather import count
from .offload import offloads_optimizer

# the one Adam of these that makes copies as large as the weights at its step
FOREACH = "adamw_torch"
# the names of Adam with whole states in float32, transformers' and DeepSpeed's
ADAMS = ("adamw_torch", "adamw_torch_fused", "Adam", "AdamW")


def layout(training: Any) -> Layout:
    """The layout that a command line asks for."""
    if training.deepspeed:
        return _deepspeed_layout(training)
    moved = training.fsdp and (training.fsdp_config or {}).get("cpu_offload")
    found = layout_of(
        split=3 if training.fsdp else 0,
        parts=int(training.world_size) if training.fsdp else 1,
        half=bool(training.bf16 or training.fp16),
        engine=False,
        foreach=training.optim == FOREACH,
        offload="parameters" if moved else "none",
    )
    return found if training.optim in ADAMS else dataclasses.replace(found, moments=0)


def _deepspeed_layout(training: Any) -> Layout:
    config: Mapping[str, Any] = training.hf_deepspeed_config.config
    zero, own = config.get("zero_optimization", {}), config.get("optimizer")
    moved = "parameters" if (zero.get("offload_param") or {}).get("device", "none") != "none" else "none"
    if moved == "none" and offloads_optimizer(config):
        moved = "optimizer"
    # DeepSpeed's switches for states in half precision: no master, and no gradients beside it
    small = any(value is True for key, value in config.get("bf16", {}).items() if key.startswith("bf16_"))
    foreach = own is None and training.optim == FOREACH
    half = bool(training.bf16 or training.fp16)
    found = layout_of(int(zero.get("stage", 0)), int(training.world_size), half, True, foreach, moved)
    if small:
        return dataclasses.replace(found, master=0, moments=0, at_step=FLOAT32 if foreach else 0)
    name = training.optim if own is None else own.get("type")
    return found if name in ADAMS else dataclasses.replace(found, moments=0)


def check(model: Any, training: Any, room: int | None = None) -> None:
    """Refuses a training whose weights, gradients and optimizer alone do not fit on a GPU of ``room`` bytes
    (this one's).

    Raises:
        TrainingError: with both numbers and what needs less.
    """
    if room is None:
        if training.device.type != "cuda":
            return
        room = int(torch.cuda.get_device_properties(training.device).total_memory)
    trained = count(parameter for parameter in model.parameters() if parameter.requires_grad)
    needed = layout(training).bytes(trained, count(model.parameters()) - trained)
    if needed > room:
        raise TrainingError(
            "out of memory before it starts: weights, gradients and the optimizer's step need"
            f" {needed / GIB:.1f} GiB on each GPU, which has {room / GIB:.1f} GiB, and activations come on"
            " top. Split more (--deepspeed zero2.json, zero3.json, or --fsdp; in the workflow's configuration"
            " `parallel`), use more GPUs, or offload the optimizer (zero3_offload.json; `offload`)"
        )
