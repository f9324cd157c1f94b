"""What a training takes on each GPU whatever its batch, so that an impossible layout is refused before it
starts.

Weights, gradients, Adam's two moments and what its step makes; activations come on top and depend on the
batch (:mod:`llava_ext.distributed.estimate`). Always the least that is needed: what is not known (another
optimizer's state, where an offload keeps its gradients) counts as nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import TrainingError
from .estimate import ADAM, FLOAT32, GIB, HALF, Layout
from .gather import count
from .offload import offloads_optimizer

# the one Adam of these that makes copies as large as the weights at its step
FOREACH = "adamw_torch"
# the names of Adam with whole states in float32, transformers' and DeepSpeed's
ADAMS = ("adamw_torch", "adamw_torch_fused", "Adam", "AdamW")


def layout(training: Any) -> Layout:
    """The layout that a command line asks for."""
    half = HALF if training.bf16 or training.fp16 else FLOAT32
    moments = ADAM if training.optim in ADAMS else 0
    at_step = FLOAT32 if training.optim == FOREACH else 0
    if training.deepspeed:
        found = training.hf_deepspeed_config.config
        return _deepspeed_layout(found, int(training.world_size), half, moments, at_step)
    if training.fsdp:
        moved = "parameters" if (training.fsdp_config or {}).get("cpu_offload") else "none"
        return Layout(3, int(training.world_size), moments=moments, at_step=at_step, offload=moved)
    cast = HALF if half == HALF else 0
    return Layout(frozen=half, moments=moments, at_step=at_step, cast=cast)


def _deepspeed_layout(config: Mapping[str, Any], world: int, half: int, moments: int, at_step: int) -> Layout:
    zero = config.get("zero_optimization", {})
    moved = "parameters" if (zero.get("offload_param") or {}).get("device", "none") != "none" else "none"
    if moved == "none" and offloads_optimizer(config):
        moved = "optimizer"
    master = FLOAT32 if half != FLOAT32 else 0
    if "optimizer" in config:
        at_step = 0
        moments = ADAM if config["optimizer"].get("type") in ADAMS else 0
    if any(value is True for key, value in config.get("bf16", {}).items() if key.startswith("bf16_")):
        master = moments = 0  # DeepSpeed's switches for states in half precision
    copied = FLOAT32 if master else 0  # its gradients in float32 beside those of the model
    return Layout(
        split=int(zero.get("stage", 0)), parts=world, weight=half, frozen=half, master=master,
        moments=moments, at_step=at_step + copied, offload=moved,
    )  # fmt: skip


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
