"""After a signal: save, then stop."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..distributed.collectives import any_rank, world_size
from . import signals
from .step_report import StepReports


class Interruption(TrainerCallback):
    """After a signal to any rank, all ranks save at the end of the same step and stop.

    Several ranks hear of it with the step's report: one that comes after the step's last forward pass ends
    the next step.
    """

    def __init__(self, reports: StepReports) -> None:
        self.reports = reports
        self.stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        heard = self.reports.signalled if world_size() > 1 else bool(signals.received)
        if self._is_due(heard, state):
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """A signal that came during a save: what was saved is all there is to do; no further step, no
        second save.
        """
        if self._is_due(any_rank(bool(signals.received), args.device), state):
            control.should_training_stop = True
        return control

    def _is_due(self, heard: bool, state: TrainerState) -> bool:
        self.stopped = self.stopped or (heard and state.global_step < state.max_steps)
        return self.stopped
