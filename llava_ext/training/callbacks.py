"""Who looks on at every step of a training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .interruption import Interruption
from .kernels import Recompilations
from .metrics import Metrics
from .throughput import Throughput
from .watchdogs import LearnsNothing, NoStep

if TYPE_CHECKING:
    from .arguments import Arguments
    from .trainer import LlavaTrainer


def add_callbacks(trainer: LlavaTrainer, arguments: Arguments, watchdog: NoStep) -> Interruption:
    """Adds them in their order, the metrics first; returns the one that knows whether a signal has stopped
    the training.
    """
    training = arguments.training
    board = bool(getattr(training, "own_tensorboard", False))
    interruption = Interruption(trainer.reports)
    trainer.watchdog = watchdog
    for callback in (
        Metrics(
            Path(training.output_dir),
            board,
            bool(training.disable_tqdm),
            Throughput.of(trainer.model, training),
        ),
        LearnsNothing(
            training.watchdog_zero_steps,
            arguments.data.supervised_share_bound,
            trainer.reports.take_recent,
            trainer.last_samples,
        ),
        watchdog,
        interruption,
        *([Recompilations()] if training.fusion == "compile" else []),
    ):
        trainer.add_callback(callback)
    return interruption
