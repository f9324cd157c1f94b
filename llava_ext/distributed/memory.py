"""What a training keeps on each GPU from the first step to the last, so that an impossible layout is refused
before it starts.

Weights, gradients and Adam's two moments; activations come on top and depend on the batch. Always the least
that is needed: what is not known (another optimizer's state, where an offload keeps its gradients) counts as
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import TrainingError
from .gather import count
from .offload import offloads_optimizer

GIB = 2**30
FLOAT32, ADAM = 4, 8
# the names of Adam with whole states in float32, transformers' and DeepSpeed's
ADAMS = ("adamw_torch", "adamw_torch_fused", "Adam", "AdamW")


@dataclass(frozen=True)
class Layout:
    """How weights lie on the GPUs.

    Attributes:
        split: what ``parts`` processes share: 0 nothing, 2 gradients and optimizer (ZeRO-2), 3 the weights
            too (ZeRO-3, FSDP).
        parts: the processes that share.
        weight: bytes of a weight that trains, as the model holds it.
        frozen: bytes of one that does not.
        master: bytes of the optimizer's own copy of a weight, 0 where it is the model's.
        moments: bytes of what the optimizer remembers of a weight.
        offload: what lies in the CPU's memory: `none`, `optimizer` (and gradients), or `parameters`
            (everything).
    """

    split: int = 0
    parts: int = 1
    weight: int = FLOAT32
    frozen: int = FLOAT32
    master: int = 0
    moments: int = ADAM
    offload: str = "none"

    def bytes(self, trained: int, frozen: int) -> float:
        """Bytes on each GPU for so many weights that train and that do not."""
        if self.offload == "parameters":
            return 0
        weights = (self.weight * trained + self.frozen * frozen) / (self.parts if self.split == 3 else 1)
        if self.offload == "optimizer":
            return weights
        updates = (self.weight + self.master + self.moments) * trained  # gradients and optimizer
        return weights + updates / (self.parts if self.split else 1)


def layout(training: Any) -> Layout:
    """The layout that a command line asks for."""
    half = 2 if training.bf16 or training.fp16 else FLOAT32
    moments = ADAM if training.optim in ADAMS else 0
    if training.deepspeed:
        return _deepspeed_layout(training.hf_deepspeed_config.config, int(training.world_size), half, moments)
    if training.fsdp:
        moved = "parameters" if (training.fsdp_config or {}).get("cpu_offload") else "none"
        return Layout(3, int(training.world_size), moments=moments, offload=moved)
    return Layout(frozen=half, moments=moments)


def _deepspeed_layout(config: Mapping[str, Any], world: int, half: int, moments: int) -> Layout:
    zero = config.get("zero_optimization", {})
    moved = "parameters" if (zero.get("offload_param") or {}).get("device", "none") != "none" else "none"
    if moved == "none" and offloads_optimizer(config):
        moved = "optimizer"
    master = FLOAT32 if half != FLOAT32 else 0
    if "optimizer" in config:
        moments = ADAM if config["optimizer"].get("type") in ADAMS else 0
    if any(value is True for key, value in config.get("bf16", {}).items() if key.startswith("bf16_")):
        master = moments = 0  # DeepSpeed's switches for states in half precision
    return Layout(int(zero.get("stage", 0)), world, half, half, master, moments, moved)


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
            f"out of memory before it starts: weights, gradients and optimizer need {needed / GIB:.1f} GiB on"
            f" each GPU, which has {room / GIB:.1f} GiB, and activations come on top. Split more (--deepspeed"
            " zero2.json, zero3.json, or --fsdp; in the workflow's configuration `parallel`), use more GPUs,"
            " or offload the optimizer (zero3_offload.json; `offload`)"
        )
