"""What happens to a training in the middle of it, at a place that does not depend on how fast it and the test
are: done by the training's own process, when a function of ours or of a library has been called so often.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow_scripts.launch.processes import descendants, signal_tree


@dataclass(frozen=True)
class After:
    """Has ``then`` done after so many ``calls`` of ``function``; of several processes, in one ``rank``."""

    function: Callable[..., Any]
    then: Callable[[], object]
    calls: int = 1
    rank: int = 0

    def __call__(self) -> None:
        *path, name = self.function.__qualname__.split(".")
        owner: Any = importlib.import_module(self.function.__module__)
        for part in path:
            owner = getattr(owner, part)
        number = itertools.count(1)

        @functools.wraps(self.function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            found = self.function(*args, **kwargs)
            if next(number) == self.calls and int(os.environ.get("RANK", 0)) == self.rank:
                self.then()
            return found

        setattr(owner, name, counted)


@dataclass(frozen=True)
class Signal:
    """Sent to the process itself."""

    number: int

    def __call__(self) -> None:
        os.kill(os.getpid(), self.number)


def _note_descendants(pids: Path) -> None:
    pids.write_text(" ".join(map(str, descendants(os.getpid()))), encoding="utf-8")


@dataclass(frozen=True)
class SignalToAll:
    """Sent to the process and to all that it has started, whose pids are written down before."""

    number: int
    pids: Path

    def __call__(self) -> None:
        _note_descendants(self.pids)
        signal_tree(os.getpid(), self.number)


@dataclass(frozen=True)
class Killed:
    """Nothing but the process itself dies; the pids of all that it has started are written down before."""

    pids: Path

    def __call__(self) -> None:
        _note_descendants(self.pids)
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Error:
    """Raised."""

    error: Exception

    def __call__(self) -> None:
        raise self.error


@dataclass(frozen=True)
class Written:
    """A file of another process' making."""

    path: Path
    text: str

    def __call__(self) -> None:
        self.path.write_text(self.text, encoding="utf-8")


@dataclass(frozen=True)
class FullDisk:
    """Files may not grow beyond so many bytes."""

    size: int

    def __call__(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))
