"""Fixtures of the training tests."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from llava_ext import train
from llava_ext.training import signals
from tests.support.trainings import GOLDEN, command_line, run


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """``uninterrupted(stage)``: the output folder of a training that nothing disturbed, made once."""
    made: dict[int, Path] = {}

    def get(stage: int) -> Path:
        if stage not in made:
            folder = tmp_path_factory.mktemp(f"stage{stage}")
            run(command_line(stage, folder / "out"), folder / "log")
            made[stage] = folder / "out"
        return made[stage]

    return get


@pytest.fixture
def train_here(monkeypatch, capfd):
    """``train_here(argv)``: a training in this process; gives (exit status, what it printed)."""
    monkeypatch.chdir(GOLDEN)
    for name in (
        "OMP_NUM_THREADS",
        "HF_HUB_OFFLINE",
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "HF_HUB_DISABLE_TELEMETRY",
    ):
        monkeypatch.setenv(name, "1")  # training sets some of these; the fixture takes them away again
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    handlers = {number: signal.getsignal(number) for number in signals.SIGNALS}

    def call(argv: Sequence[str]) -> tuple[int, str]:
        AcceleratorState._reset_state(True)
        capfd.readouterr()
        try:
            train.main(argv)
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        return status, capfd.readouterr().err

    yield call
    AcceleratorState._reset_state(True)
    for number, handler in handlers.items():
        signal.signal(number, handler)
