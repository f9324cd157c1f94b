"""As few layers are recomputed as the memory that is left allows: for `--checkpoint_layers auto`, and said to
whoever has run out of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..distributed.estimate import FLOAT32, GIB, HALF, Decoder, Layout, Work, checkpointed_layers, needs
from ..distributed.gather import count
from ..distributed.memory import layout
from ..kernels import recomputed_layers
from .optimizer import LANGUAGE_MODEL, component, trainable_names
from .verdict import is_out_of_memory

# What the estimate may take of a GPU; the rest is for its error and for what lies in pieces.
MARGIN = 0.9
# Intervals that have a name.
NAMED = {0: "none", 1: "all"}


@dataclass(frozen=True)
class Estimate:
    """What a training takes of a GPU, by its largest micro-batch and the layers that are recomputed."""

    decoder: Decoder
    layout: Layout
    trained: int
    frozen: int
    work: Work

    @classmethod
    def of(cls, model: Any, training: Any, tokens: int) -> Estimate:
        """Of a model as it trains; ``tokens``: of the largest micro-batch."""
        trained = count(parameter for parameter in model.parameters() if parameter.requires_grad)
        learns = any(component(name) == LANGUAGE_MODEL for name in trainable_names(model))
        element = HALF if training.bf16 or training.fp16 else FLOAT32
        return cls(
            Decoder.of(model.config.text_config.to_dict()),
            layout(training),
            trained,
            count(model.parameters()) - trained,
            Work(tokens, 0, learns, training.fusion, element),
        )

    def recomputed(self, interval: int) -> int:
        """Layers that are recomputed with an interval; 0: none."""
        return recomputed_layers(interval or "none", self.decoder.layers)

    def peak(self, interval: int) -> float:
        """Bytes of a GPU."""
        work = replace(self.work, checkpointed=self.recomputed(interval))
        return needs(self.decoder, self.layout, self.trained, self.frozen, work).peak

    def smaller(self, samples: int, of: int) -> Estimate:
        """With so many samples in a micro-batch that had ``of``."""
        return replace(self, work=replace(self.work, tokens=-(-self.work.tokens * samples // of)))

    def interval(self, room: float) -> int | None:
        """The largest interval that fits into ``room`` bytes, 0 where nothing has to be recomputed; None:
        nothing fits.
        """
        needed = checkpointed_layers(self.decoder, self.layout, self.trained, self.frozen, self.work, room)
        if not needed:
            return needed
        fitting = range(self.decoder.layers, 0, -1)
        return next(every for every in fitting if self.recomputed(every) >= needed)


def gpu_room(training: Any) -> int | None:
    """Bytes of this process's GPU; None on the CPU."""
    if training.device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(training.device).total_memory)


def choose_interval(model: Any, training: Any, tokens: int, room: int | None = None) -> tuple[int, str]:
    """Of how many layers one is recomputed (0: none), and a line that says why.

    Args:
        tokens: of the largest micro-batch.
        room: bytes of a GPU (this one's). On the CPU everything is kept.
    """
    room = gpu_room(training) if room is None else room
    if room is None:
        return 0, "--checkpoint_layers auto: on the CPU all activations are kept"
    estimate = Estimate.of(model, training, tokens)
    found = estimate.interval(MARGIN * room)
    interval = 1 if found is None else found
    return interval, (
        f"--checkpoint_layers auto: {estimate.recomputed(interval)} of {estimate.decoder.layers} layers are"
        f" recomputed (the value {NAMED.get(interval, interval)}), for micro-batches of up to {tokens}"
        f" tokens on {room / GIB:.1f} GiB, of which {1 - MARGIN:.0%} stay free"
    )


def present_interval(training: Any) -> int:
    """Of how many layers one is recomputed now; 0: none."""
    given = dict(training.activation_checkpointing_kwargs or {})
    return int(given.get("every_n_layers", 1)) if training.activation_checkpointing else 0


def what_fits(estimate: Estimate, interval: int, samples: int, room: float) -> str:
    """What would fit where a training has run out of memory, in a sentence: first more recomputation, then
    fewer samples in a micro-batch.

    Args:
        estimate, interval, samples: of the training as it was.
        room: bytes of the GPU. Where the estimate was below, what it said counts, for so much was too much.
    """
    bound = MARGIN * min(room, estimate.peak(interval))
    tried = samples
    while tried:
        smaller = estimate.smaller(tried, samples)
        found = smaller.interval(bound)
        if found is not None:
            every = max(found, interval, key=smaller.recomputed)
            batch = "" if tried == samples else f"--per_device_train_batch_size {tried} with "
            return (
                f"By the estimate {batch}--checkpoint_layers {NAMED.get(every, every)} fits"
                f" ({smaller.peak(every) / GIB:.1f} of {room / GIB:.1f} GiB)."
            )
        tried //= 2
    return f"By the estimate no micro-batch fits into {room / GIB:.1f} GiB."


@contextmanager
def advice(model: Any, training: Any, tokens: int) -> Iterator[None]:
    """While it lasts, an error of too little memory takes along what would fit."""
    try:
        yield
    except RuntimeError as error:
        room = gpu_room(training)
        if is_out_of_memory(error) and room is not None:
            estimate = Estimate.of(model, training, tokens)
            samples = training.per_device_train_batch_size
            error.add_note(what_fits(estimate, present_interval(training), samples, room))
        raise
