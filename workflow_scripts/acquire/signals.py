"""A signal to Snakemake alone ends its downloads too: it waits for its jobs, and a download takes hours."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from workflow_scripts.acquire.stopping import SIGNALS
from workflow_scripts.launch.processes import descendants

DOWNLOADING = ("acquire", "prepare_model")
"""Steps that continue where they were. Trainings hear from Snakemake in their own way."""


def is_download(arguments: list[str]) -> bool:
    """True for a step that downloads: ``... -m workflow_scripts.step --log FILE STEP ...``."""
    if "workflow_scripts.step" not in arguments:
        return False
    name = arguments.index("workflow_scripts.step") + 3
    return name < len(arguments) and arguments[name] in DOWNLOADING


def downloads_below(pid: int) -> list[int]:
    """The processes below ``pid`` that download."""
    found = []
    for child in descendants(pid):
        with contextlib.suppress(OSError):
            if is_download(Path(f"/proc/{child}/cmdline").read_text(errors="replace").split("\0")):
                found.append(child)
    return found


def end_downloads_with_snakemake() -> None:
    """To be called by the main Snakemake when it starts its jobs: SIGINT and SIGTERM reach its downloads."""
    for number in SIGNALS:
        with contextlib.suppress(ValueError):  # not in the main thread
            _pass_on(number)


def _pass_on(number: signal.Signals) -> None:
    former: Any = signal.getsignal(number)

    def hear(heard: int, frame: FrameType | None) -> None:
        for child in downloads_below(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, heard)
        if callable(former):
            former(heard, frame)

    signal.signal(number, hear)
