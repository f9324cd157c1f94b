"""The numbers of a training: metrics.jsonl, TensorBoard, a line for people."""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import say
from ..files import write_text
from .claim import check_claim
from .throughput import Throughput

# A share of the time of so many log lines that is worth a remark.
NOTICED, WINDOW = 0.2, 20


class Metrics(TrainerCallback):
    """One JSON object a logging step in ``metrics.jsonl``, the same numbers for TensorBoard, and a line
    for people.
    """

    NAMES = (("loss", "loss"), ("learning_rate", "lr"), ("grad_norm", "grad_norm"), ("epoch", "epoch"))

    def __init__(
        self,
        output_dir: Path,
        tensorboard: bool,
        lines: bool,
        throughput: Throughput,
        every_s: float = 10.0,
    ) -> None:
        self.throughput = throughput
        self.path = output_dir / "metrics.jsonl"
        self.board_dir = output_dir / "tensorboard"
        self.tensorboard = tensorboard
        self.lines = lines
        self.every_s = every_s
        self.stream: Any = None
        self.board: Any = None
        self.last_line = 0.0
        self.waited: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self.said = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start = self.last = time.monotonic()
        self.first_step = state.global_step
        if not state.is_world_process_zero:
            return
        kept = [line for line in _lines(self.path) if line["step"] <= state.global_step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
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
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        now = time.monotonic()
        seconds = max(now - self.last, 1e-9)
        row: dict[str, Any] = {"step": state.global_step}
        row |= {ours: float(logs[theirs]) for theirs, ours in self.NAMES if logs.get(theirs) is not None}
        row |= {
            "tokens_per_s": logs["tokens"] / seconds,
            "samples_per_s": logs["samples"] / seconds,
            "tokens": int(logs["tokens"]),
            "supervised_tokens": int(logs["supervised_tokens"]),
            **self.throughput.row(logs, seconds),
            "data_wait_share": min(logs["data_wait_s"] / seconds, 1.0),
            "time": time.time(),
        }
        self._write(row)
        if state.global_step > self.first_step + 1:  # the first step waits for the workers to start
            self._notice_waiting(logs["data_wait_s"], seconds, args.dataloader_num_workers)
        self.last = now
        if self.lines and (now - self.last_line >= self.every_s or state.global_step == state.max_steps):
            self.last_line = now
            self._line(row, state)

    def _notice_waiting(self, waited_s: float, seconds: float, workers: int) -> None:
        """Says it, once in a training, when the dataset is what the steps wait for."""
        self.waited.append((waited_s, seconds))
        waited, passed = (sum(column) for column in zip(*self.waited, strict=True))
        if self.said or len(self.waited) < WINDOW or waited < NOTICED * passed:
            return
        self.said = True
        say(
            f"{waited / passed:.0%} of the time of the last {WINDOW} log lines was spent in waiting for"
            f" samples; --dataloader_num_workers is {workers}: raise it where there are cores to spare, or"
            " ask for more cores"
        )

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
    """A TensorBoard writer that discards what an earlier attempt wrote after ``step``; None where it is
    not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("tensorboard is not installed: metrics go to metrics.jsonl only")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1, max_queue=1000, flush_secs=20)
