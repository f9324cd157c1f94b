"""What all ranks know of a step before the optimizer changes a weight: its losses, its counts, a signal.

It is sent as one message with the forward pass of the step's last micro-batch, and read when the optimizer is
about to begin. The host waits for that forward pass at most, with the whole backward pass queued behind it,
and no device ever waits for the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..distributed.collectives import world_size
from ..errors import NoVerdict, TrainingError
from . import signals

# The collator's counts by their names in logs.
COUNTS = {
    "tokens": "tokens",
    "text": "text_tokens",
    "supervised": "supervised_tokens",
    "samples": "samples",
    "pairs": "attention_pairs",
    "images": "images",
}


class Message:
    """Numbers of all ranks, summed, on their way to the host. Every rank must send.

    Args:
        measured: (): a number on the device.
        known: numbers that the host has.
    """

    def __init__(self, measured: torch.Tensor, known: Sequence[float]) -> None:
        numbers = torch.tensor(known, dtype=torch.float64)
        if world_size() > 1:
            if measured.is_cuda:
                numbers = numbers.pin_memory().to(measured.device, non_blocking=True)
            numbers = torch.cat([measured.double()[None], numbers])
            dist.all_reduce(numbers)
            measured, numbers = numbers[0], numbers[1:]
        # From a GPU into pinned memory, which is not waited for.
        self._measured = measured.to("cpu", non_blocking=True)
        self._known = numbers.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if measured.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> list[float]:
        """The sums: what was measured, then what was known."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [float(self._measured), *self._known.tolist()]


class StepReports(TrainerCallback):
    """Ends a training whose loss is no number before the optimizer changes a weight; keeps what steps have
    counted.

    Args:
        samples: names samples by their indices, one a line.

    Attributes:
        signalled: a signal had come to any rank when the last step's message was sent.
        losses: (micro-batches of this step,): their losses, on the device, and the indices of their samples.
    """

    def __init__(self, samples: Callable[[Sequence[int]], list[str]]) -> None:
        self.samples = samples
        self.signalled = False
        self.losses: list[tuple[torch.Tensor, Sequence[int]]] = []
        self._counted = dict.fromkeys(COUNTS, 0)
        self._message: Message | None = None
        self._since_log = dict.fromkeys(COUNTS.values(), 0.0)
        self._recent = [0.0, 0.0, 0.0]
        self._hook: Any = None

    def add(self, loss: torch.Tensor, counts: dict[str, int], indices: Sequence[int], last: bool) -> None:
        """One micro-batch of this rank; the last of a step sends the message."""
        self.losses.append((loss.detach(), indices))
        for name in COUNTS:
            self._counted[name] += counts[name]
        if last:
            total = torch.stack([loss for loss, _ in self.losses]).sum()
            self._message = Message(total, [float(bool(signals.received)), *self._counted.values()])
            self._counted = dict.fromkeys(COUNTS, 0)

    def read(self, step: int) -> None:
        """Takes the step's message, if there is one that was not read.

        Raises:
            TrainingError: a loss of this rank is not finite; :class:`NoVerdict` where one of another rank is.
        """
        if self._message is None:
            return
        loss, signalled, *counts = self._message.read()
        self._message = None
        if not math.isfinite(loss):
            raise self._not_finite(step)
        self.losses = []
        self.signalled = signalled > 0
        for name, number in zip(self._since_log, counts, strict=True):
            self._since_log[name] += number
        named = dict(zip(COUNTS, counts, strict=True))
        news = (loss, named["supervised"], named["text"])
        self._recent = [old + new for old, new in zip(self._recent, news, strict=True)]

    def _not_finite(self, step: int) -> TrainingError:
        found = ((float(loss), indices) for loss, indices in self.losses)
        value, indices = next((item for item in found if not math.isfinite(item[0])), (0.0, []))
        if math.isfinite(value):
            return NoVerdict(
                f"the loss is not finite on another rank at step {step}; stopped before the weights changed"
            )
        return TrainingError(
            f"the loss is {value} at step {step}; stopped before the weights changed. The samples of this"
            " micro-batch:\n"
            + "\n".join(self.samples(indices))
            + "\nLook at these samples, the learning rate and the precision; the last checkpoint is kept."
        )

    def take_counts(self) -> dict[str, float]:
        """Tokens, text tokens, supervised tokens and samples of all ranks since the last call."""
        taken, self._since_log = self._since_log, dict.fromkeys(self._since_log, 0.0)
        return taken

    def take_recent(self) -> tuple[float, float, float]:
        """The sums of losses, tokens with a label and text tokens of all ranks since the last call."""
        loss, supervised, text = self._recent
        self._recent = [0.0, 0.0, 0.0]
        return loss, supervised, text

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        inner = innermost(kwargs["optimizer"])
        self._hook = inner.register_step_pre_hook(lambda *_: self.read(state.global_step + 1))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.read(state.global_step)  # float16's scaler may have left the optimizer's step out

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._hook.remove()


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """torch's own optimizer, within those of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
