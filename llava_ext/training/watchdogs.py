"""What ends a training that learns nothing or no longer moves."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import TrainingError
from .states import RESULT, write_result


class Counting(Protocol):
    """What is asked of a trainer: its last logged counts, and the samples of its last micro-batch."""

    taken: dict[str, float]

    def last_samples(self) -> list[str]: ...


NO_STEP_EXIT = 75


class StuckAtZero(TrainerCallback):
    """Stops when the loss has been zero for so many logged steps: nothing is learned any more."""

    def __init__(self, limit: int, samples: Callable[[], list[str]]) -> None:
        self.limit = limit
        self.samples = samples
        self.seen = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.limit or not logs or "loss" not in logs:
            return
        self.seen = self.seen + 1 if abs(float(logs["loss"])) < 1e-9 else 0
        if self.seen >= self.limit:
            raise TrainingError(
                f"the loss has been zero for {self.seen} logged steps up to step {state.global_step}; the last batch was\n"
                + "\n".join(self.samples())
                + "\nCheck the learning rate, the labels (python -m llava_ext.statistics) and the precision. "
                "--watchdog_zero_steps 0 turns this check off."
            )


class FewLabels(TrainerCallback):
    """Stops when hardly any token of the last steps carried a label, wherever in the data that begins."""

    def __init__(self, bound: float, window: int, trainer: Counting) -> None:
        self.bound = bound
        self.trainer = trainer
        self.seen: deque[tuple[float, float]] = deque(maxlen=max(window, 1))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.bound or not logs or "loss" not in logs:
            return
        taken = self.trainer.taken
        self.seen.append((taken["supervised"], taken["text"]))
        supervised, text = (sum(column) for column in zip(*self.seen, strict=True))
        if len(self.seen) == self.seen.maxlen and supervised < self.bound * text:
            raise TrainingError(
                f"only {supervised:.0f} of {text:.0f} text tokens carried a label in the last {len(self.seen)} logged steps up to step "
                f"{state.global_step} ({supervised / text:.2%}, --supervised_share_bound: {self.bound:.2%}); the last batch was\n"
                + "\n".join(self.trainer.last_samples())
                + "\nCheck --version and --model_max_length with `python -m llava_ext.statistics`; the last checkpoint is kept."
            )


class NoStep(TrainerCallback):
    """Ends the process, with every thread's stack in the log, when nothing has gone on for too long.

    It watches from before the processes first talk to each other until the last file is written. A rank that waits
    for a lost one can't be woken; the last checkpoint is kept and the launcher tries again.
    """

    def __init__(self, minutes: float, output_dir: Path) -> None:
        self.limit_s = 60.0 * minutes
        self.output_dir = output_dir
        self.done = threading.Event()
        self.step = 0
        self.doing = "starting"
        self.beat()

    def start(self) -> None:
        """Watches from now on."""
        if self.limit_s:
            threading.Thread(target=self._watch, name="no-step watchdog", daemon=True).start()

    def end(self) -> None:
        """Watches no longer."""
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
