"""Trackers may fail; the training goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ..errors import say

if TYPE_CHECKING:
    pass


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
