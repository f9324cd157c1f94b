"""What ends a training that learns nothing or no longer moves."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import TrainingError
from .states import RESULT, write_result

NO_STEP_EXIT = 75


class StuckAtZero(TrainerCallback):
    """Stops when the loss has been zero for so many steps: nothing is learned any more.

    What it knows lies in the trainer's own history: a training that continues knows of the steps before, too.
    """

    def __init__(self, limit: int, samples: Callable[[], list[str]]) -> None:
        self.limit = limit
        self.samples = samples

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.limit or "loss" not in (logs or {}):
            return
        logged = (row for row in reversed(state.log_history) if "loss" in row)
        learned = next((row["step"] for row in logged if abs(row["loss"]) >= 1e-9), 0)
        if state.global_step - learned >= self.limit:
            raise TrainingError(
                f"the loss has been zero for {state.global_step - learned} steps up to step"
                f" {state.global_step}; the last batch was\n"
                + "\n".join(self.samples())
                + "\nCheck the learning rate, the labels (python -m llava_ext.statistics) and the precision. "
                "--watchdog_zero_steps 0 turns this check off."
            )


class FewLabels(TrainerCallback):
    """Stops when hardly any token of the last ``window`` steps carried a label, wherever in the data that
    begins.
    """

    def __init__(self, bound: float, window: int, samples: Callable[[], list[str]]) -> None:
        self.bound = bound
        self.window = max(window, 1)
        self.samples = samples

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logged = [row for row in state.log_history if "supervised_tokens" in row]
        last = [row for row in logged if row["step"] > state.global_step - self.window]
        # a row is of all steps since the one before it
        steps = state.global_step - (logged[-len(last) - 1]["step"] if len(logged) > len(last) else 0)
        supervised, text = (sum(row[name] for row in last) for name in ("supervised_tokens", "text_tokens"))
        if steps >= self.window and supervised < self.bound * text:
            raise TrainingError(
                f"only {supervised:.0f} of {text:.0f} text tokens carried a label in the last {steps} steps"
                f" up to step {state.global_step} ({supervised / text:.2%}, --supervised_share_bound:"
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
