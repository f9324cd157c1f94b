"""Who looks on at every step of a training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .interruption import Interruption
from .metrics import Metrics
from .watchdogs import FewLabels, NoStep, StuckAtZero

if TYPE_CHECKING:
    from .arguments import Arguments
    from .trainer import LlavaTrainer


def add_callbacks(trainer: LlavaTrainer, arguments: Arguments, watchdog: NoStep) -> Interruption:
    """Adds them in their order, the metrics first; returns the one that knows whether a signal has stopped
    the training.
    """
    training, window = arguments.training, arguments.training.watchdog_zero_steps
    board = bool(getattr(training, "own_tensorboard", False))
    interruption = Interruption()
    trainer.watchdog = watchdog
    for callback in (
        Metrics(Path(training.output_dir), board, lines=bool(training.disable_tqdm)),
        StuckAtZero(window, trainer.last_samples),
        FewLabels(arguments.data.supervised_share_bound if window else 0, window, trainer.last_samples),
        watchdog,
        interruption,
    ):
        trainer.add_callback(callback)
    return interruption
