"""`--checkpoint_layers auto`: as few layers are recomputed as the memory that is left allows."""

from __future__ import annotations

from typing import Any

import torch

from ..distributed.estimate import FLOAT32, GIB, HALF, Decoder, Layout, Work, checkpointed_layers
from ..distributed.gather import count
from ..distributed.memory import layout
from ..kernels import recomputed_layers
from .optimizer import LANGUAGE_MODEL, component, trainable_names

# What the estimate may take of a GPU; the rest is for its error and for what lies in pieces.
MARGIN = 0.9


def choose_interval(model: Any, training: Any, tokens: int, room: int | None = None) -> tuple[int, str]:
    """Of how many layers one is recomputed (0: none), and a line that says why.

    Args:
        tokens: of the largest micro-batch.
        room: bytes of a GPU (this one's). On the CPU everything is kept.
    """
    if room is None:
        if training.device.type != "cuda":
            return 0, "--checkpoint_layers auto: on the CPU all activations are kept"
        room = int(torch.cuda.get_device_properties(training.device).total_memory)
    decoder = Decoder.of(model.config.text_config.to_dict())
    trained = count(parameter for parameter in model.parameters() if parameter.requires_grad)
    frozen = count(model.parameters()) - trained
    learns = any(component(name) == LANGUAGE_MODEL for name in trainable_names(model))
    half = training.bf16 or training.fp16
    work = Work(tokens, 0, learns, training.fusion, HALF if half else FLOAT32)
    interval = _interval(decoder, layout(training), trained, frozen, work, MARGIN * room)
    recomputed = recomputed_layers(interval or "none", decoder.layers)
    return interval, (
        f"--checkpoint_layers auto: {recomputed} of {decoder.layers} layers are recomputed (the value"
        f" {interval or 'none'}), for micro-batches of up to {tokens} tokens on {room / GIB:.1f} GiB, of"
        f" which {1 - MARGIN:.0%} stay free"
    )


def _interval(decoder: Decoder, states: Layout, trained: int, frozen: int, work: Work, room: float) -> int:
    """The largest interval that fits, 0 where nothing has to be recomputed, 1 where nothing seems to fit."""
    needed = checkpointed_layers(decoder, states, trained, frozen, work, room)
    if needed is None or needed == 0:
        return 1 if needed is None else 0
    fitting = range(decoder.layers, 0, -1)
    return next(every for every in fitting if recomputed_layers(every, decoder.layers) >= needed)
