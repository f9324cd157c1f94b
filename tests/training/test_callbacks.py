"""Trackers that fail while a training runs."""

from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from llava_ext.training.trackers import let_fail


class BrittleCallback(TrainerCallback):
    """A tracker whose connection goes away."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, *args, **kwargs):
        raise ValueError("no key")

    def on_log(self, *args, **kwargs):
        self.seen.append("log")
        raise ConnectionResetError("gone")

    def on_train_end(self, *args, **kwargs):
        self.seen.append("end")


def test_a_tracker_that_fails_is_said_once_and_gets_nothing_more(capsys):
    tracker = BrittleCallback()
    let_fail(tracker)
    for _ in range(2):
        tracker.on_log(SimpleNamespace(), None, None, logs={"loss": 1.0})
    tracker.on_train_end(SimpleNamespace(), None, None)
    assert tracker.seen == ["log"]
    assert capsys.readouterr().err == (
        "llava_ext: Brittle has failed (ConnectionResetError: gone) and gets nothing more; metrics.jsonl has every step\n"
    )


def test_a_tracker_that_can_not_start_stops_the_training():
    tracker = BrittleCallback()
    let_fail(tracker)
    with pytest.raises(ValueError, match="no key"):
        tracker.on_train_begin(SimpleNamespace(), None, None)
