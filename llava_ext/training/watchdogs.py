"""What ends a training that learns nothing or no longer moves."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..errors import TrainingError
from .states import RESULT, write_result

NO_STEP_EXIT = 75


@dataclass(frozen=True)
class Stretch:
    """Some steps, of all ranks together: the sum of their losses, their tokens with a label and of text."""

    steps: int
    loss: float
    supervised: float
    text: float


class LearnsNothing(TrainerCallback, ExportableState):
    """Stops when for so many steps the loss has been zero, or hardly any token carried a label.

    It looks every few steps, however often they are logged. What it has seen goes into checkpoints: a
    training that continues knows of the steps before.

    Args:
        limit: so many steps; 0: never.
        bound: the least share of the text tokens that carry a label; 0: any.
        take_recent: the sums over the steps since it was last called.
        samples: the samples of the last micro-batch, for the message.
    """

    def __init__(
        self,
        limit: int,
        bound: float,
        take_recent: Callable[[], tuple[float, float, float]],
        samples: Callable[[], list[str]],
    ) -> None:
        self.limit = limit
        self.bound = bound
        self.take_recent = take_recent
        self.samples = samples
        self.every = max(1, limit // 4)
        self.last_look = 0
        self.stretches: list[Stretch] = []

    def state(self) -> dict[str, Any]:
        """For the trainer's own state."""
        return {"args": {}, "attributes": {"stretches": [astuple(item) for item in self.stretches]}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.stretches = [Stretch(*numbers) for numbers in saved["attributes"]["stretches"]]
        self.last_look = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.limit or state.global_step % self.every:
            return
        self.stretches.append(Stretch(state.global_step - self.last_look, *self.take_recent()))
        self.last_look = state.global_step
        while sum(item.steps for item in self.stretches[1:]) >= self.limit:
            del self.stretches[0]
        self._check_loss(state.global_step)
        self._check_labels(state.global_step)

    def _check_loss(self, step: int) -> None:
        idle = list(takewhile(lambda item: item.loss < 1e-9 * item.steps, reversed(self.stretches)))
        steps = sum(item.steps for item in idle)
        if steps >= self.limit:
            raise TrainingError(
                f"the loss has been zero for {steps} steps up to step {step}; the last batch was\n"
                + "\n".join(self.samples())
                + "\nCheck the learning rate, the labels (python -m llava_ext.statistics) and the precision. "
                "--watchdog_zero_steps 0 turns this check off."
            )

    def _check_labels(self, step: int) -> None:
        steps, supervised, text = (
            sum(getattr(item, name) for item in self.stretches) for name in ("steps", "supervised", "text")
        )
        if steps >= self.limit and supervised < self.bound * text:
            raise TrainingError(
                f"only {supervised:.0f} of {text:.0f} text tokens carried a label in the last {steps} steps"
                f" up to step {step} ({supervised / text:.2%}, --supervised_share_bound:"
                f" {self.bound:.2%}); the last batch was\n"
                + "\n".join(self.samples())
                + "\nCheck --version and --model_max_length with `python -m llava_ext.statistics`; the last"
                " checkpoint is kept."
            )


class NoStep(TrainerCallback):
    """Ends the process, with every thread's stack in the log, when nothing has gone on for too long.

    It watches from before the processes first talk to each other until the last file is written. A rank that
    waits for a lost one can't be woken; the last checkpoint is kept and the launcher tries again.
    """

    def __init__(self, minutes: float, output_dir: Path) -> None:
        self.limit_s = 60.0 * minutes
        self.output_dir = output_dir
        self.done = threading.Event()
        self.step = 0
        self.doing = "starting"
        self.beat()

    def __enter__(self) -> Self:
        if self.limit_s:
            threading.Thread(target=self._watch, name="no-step watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()

    def beat(self, doing: str | None = None) -> None:
        """Notes progress: a step, a save, a load, or the begin of something else."""
        self.last = time.monotonic()
        self.doing = doing or self.doing

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step = state.global_step
        self.beat("training")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step = state.global_step
        self.beat()

    on_save = on_step_end

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.beat("writing the final weights")

    def _watch(self) -> None:
        while not self.done.wait(min(self.limit_s / 4, 5.0)):
            if time.monotonic() - self.last > self.limit_s:
                self._stop()

    def _stop(self) -> None:
        what = f"no step has ended for {self.limit_s / 60:g} minutes after step {self.step}"
        if self.doing != "training":
            what = f"nothing has gone on for {self.limit_s / 60:g} minutes while {self.doing}"
        rank = os.environ.get("RANK", "0")
        reason = f"{what} (rank {rank}); every thread's stack is in the log"
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        print(f"error: {reason}", file=sys.stderr, flush=True)
        if rank == "0" and not (self.output_dir / RESULT).exists():
            write_result(self.output_dir, "stopped", self.step, reason=reason)
        os._exit(NO_STEP_EXIT)
