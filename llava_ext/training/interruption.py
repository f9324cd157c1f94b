"""After a signal: save, then stop."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..distributed.collectives import any_rank
from . import signals


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
        """A signal that came during a save: what was saved is all there is to do; no further step, no
        second save.
        """
        if self._is_due(args, state):
            control.should_training_stop = True
        return control

    def _is_due(self, args: TrainingArguments, state: TrainerState) -> bool:
        self.stopped = self.stopped or (
            any_rank(bool(signals.received), args.device) and state.global_step < state.max_steps
        )
        return self.stopped
