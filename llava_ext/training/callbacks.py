"""What watches a training: metrics, progress, signals, watchdogs."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import signals
from .states import RESULT, TrainingError, check_claim, say, write_result

if TYPE_CHECKING:
    from .trainer import LlavaTrainer

NO_STEP_EXIT = 75


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set on any rank; every rank must ask."""
    if world_size() == 1:
        return flag
    votes = torch.tensor([float(flag)], device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def from_all(value: Any) -> list[Any]:
    """The values of all ranks, in their order; every rank must ask."""
    found = [value] * world_size()
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found


# ---- signals ----------------------------------------------------------------------------------------------------


class Interruption(TrainerCallback):
    """After a signal to any rank, all ranks save at the end of the same step and stop."""

    def __init__(self) -> None:
        self.stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._is_due(args, state):
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """A signal that came during a save: what was saved is all there is to do; no further step, no second save."""
        if self._is_due(args, state):
            control.should_training_stop = True
        return control

    def _is_due(self, args: TrainingArguments, state: TrainerState) -> bool:
        self.stopped = self.stopped or (
            any_rank(bool(signals.received), args.device) and state.global_step < state.max_steps
        )
        return self.stopped


# ---- metrics ----------------------------------------------------------------------------------------------------


class Metrics(TrainerCallback):
    """One JSON object a logging step in ``metrics.jsonl``, the same numbers for TensorBoard, and a line for people."""

    NAMES = (("loss", "loss"), ("learning_rate", "lr"), ("grad_norm", "grad_norm"), ("epoch", "epoch"))

    def __init__(self, output_dir: Path, tensorboard: bool, lines: bool, every_s: float = 10.0) -> None:
        self.path = output_dir / "metrics.jsonl"
        self.board_dir = output_dir / "tensorboard"
        self.tensorboard = tensorboard
        self.lines = lines
        self.every_s = every_s
        self.trainer: LlavaTrainer | None = None
        self.stream: Any = None
        self.board: Any = None
        self.last_line = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start = self.last = time.monotonic()
        self.first_step = self.last_step = state.global_step
        if not state.is_world_process_zero:
            return
        kept = [line for line in _lines(self.path) if line["step"] <= state.global_step]
        temporary = self.path.with_name(".metrics.jsonl.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(self.path)
        self.stream = self.path.open("a", encoding="utf-8", buffering=1)
        if self.tensorboard:
            self.board = _board(self.board_dir, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs or self.trainer is None:
            return
        now = time.monotonic()
        counts = self.trainer.take_counts()
        if not state.is_world_process_zero:
            return
        seconds = max(now - self.last, 1e-9)
        row: dict[str, Any] = {"step": state.global_step}
        row |= {ours: float(logs[theirs]) for theirs, ours in self.NAMES if logs.get(theirs) is not None}
        row |= {
            "tokens_per_s": counts["tokens"] / seconds,
            "samples_per_s": counts["samples"] / seconds,
            "supervised_tokens": int(counts["supervised"]),
            "time": time.time(),
        }
        self._write(row)
        self.last, self.last_step = now, state.global_step
        if self.lines and (now - self.last_line >= self.every_s or state.global_step == state.max_steps):
            self.last_line = now
            self._line(row, state)

    def _write(self, row: dict[str, Any]) -> None:
        check_claim(self.path.parent)
        if self.stream is not None:
            self.stream.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in row.items():
                if name not in ("step", "time"):
                    self.board.add_scalar(f"train/{name}", value, row["step"])

    def _line(self, row: dict[str, Any], state: TrainerState) -> None:
        done = max(state.global_step - self.first_step, 1)
        left = (state.max_steps - state.global_step) * (time.monotonic() - self.start) / done
        say(
            f"step {row['step']}/{state.max_steps}, loss {row['loss']:.4f}, lr {row.get('lr', 0):.2e}, "
            f"{row['samples_per_s']:.1f} samples/s, {int(left // 60)}:{int(left % 60):02d} left"
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for stream in (self.stream, self.board):
            if stream is not None:
                stream.close()
        self.stream = self.board = None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a line that was cut by a kill is dropped."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def _board(folder: Path, step: int) -> Any:
    """A TensorBoard writer that discards what an earlier attempt wrote after ``step``; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("tensorboard is not installed: metrics go to metrics.jsonl only")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1, max_queue=1000, flush_secs=20)


# ---- trackers ---------------------------------------------------------------------------------------------------


def let_fail(tracker: TrainerCallback) -> None:
    """From its first event after the start on, a tracker that fails is said once and left out; the training goes on.

    W&B's own process, say, dies of the signal that tells the job to save, and the next log line raises.
    """
    events = [name for name in dir(TrainerCallback) if name.startswith("on_")]
    for name in set(events) - {"on_init_end", "on_train_begin"}:
        setattr(tracker, name, partial(_try_event, tracker, getattr(tracker, name), events))


def _try_event(
    tracker: TrainerCallback, event: Callable[..., Any], events: Sequence[str], *args: Any, **kwargs: Any
) -> Any:
    try:
        return event(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - a tracker may raise anything
        name = type(tracker).__name__.removesuffix("Callback")
        say(
            f"{name} has failed ({type(error).__name__}: {error}) and gets nothing more; metrics.jsonl has every step"
        )
        for silenced in events:
            setattr(tracker, silenced, _do_nothing)
        return None


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass


# ---- watchdogs --------------------------------------------------------------------------------------------------


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

    def __init__(self, bound: float, window: int, trainer: LlavaTrainer) -> None:
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


def finite(loss: torch.Tensor) -> bool:
    """Whether a loss is a number."""
    return math.isfinite(float(loss.detach()))
