"""Runs the training as a child that gets the job's signals, and shows its log while it is written."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from workflow_scripts.launch.processes import descendants

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1


def _prepare_child(ignore_term: bool) -> Callable[[], None]:
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        if ignore_term:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        else:
            # A launcher that is killed must not leave a training behind: it is told to save and end.
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    return prepare


class Training:
    """A running training. Its output goes to a file, not to a pipe: it must survive whoever reads it.

    In a `with` block signals to this process go on to the training, from before its start until the block
    ends.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        label: str,
        several: bool,
        job: str,
    ) -> None:
        """To start ``command``: ``several`` processes under torchrun, or on several machines of the Slurm
        ``job``.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self.child: subprocess.Popen[bytes] | None = None
        self.command, self.environment = list(command), dict(environment)
        self.log = log
        self.label = label
        self.several = several
        self.job = job
        self._early: list[int] = []  # signals before there is a child
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Training:
        self._handlers = {number: signal.signal(number, self._forward) for number in FORWARDED}
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def pid(self) -> int:
        """The process that was started."""
        assert self.child is not None, "not started"
        return self.child.pid

    def start(self) -> None:
        """Starts the training. Signals that have come before reach it too."""
        with self.log.open("ab") as stream:
            child = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # torchrun ignores SIGTERM (inherited) and leaves the end to its workers, which install their
                # own handler
                preexec_fn=_prepare_child(self.several),
            )
        self.child = child
        for number in self._early:
            self._forward(number, None)

    def _forward(self, number: int, frame: object) -> None:
        if self.child is None:
            self._early.append(number)
            return
        if self.child.returncode is not None:  # it has ended; what is left is to record how
            return
        if self.job:  # the processes are on other machines: Slurm reaches them
            subprocess.run(["scancel", "--signal=TERM", self.job], check=False, timeout=60)
            return
        targets = descendants(self.child.pid) if self.several else [self.child.pid]
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def wait(self) -> int:
        """Waits for the end and returns the exit status."""
        assert self.child is not None, "not started"
        stop = threading.Event()
        reader = threading.Thread(target=follow, args=(self.log, self.label, stop), daemon=True)
        reader.start()
        try:
            return self.child.wait()
        finally:
            stop.set()
            reader.join(timeout=5)


def follow(path: Path, label: str, stop: threading.Event) -> None:
    """Copies the lines that are appended to ``path`` to stderr, labelled, until ``stop`` is set and all is
    copied.
    """
    with path.open("rb") as stream:
        rest = b""
        while True:
            last = stop.is_set()
            rest += stream.read()
            *lines, rest = rest.split(b"\n")
            if last and rest:
                lines, rest = [*lines, rest], b""
            for line in lines:
                shown = line.rpartition(b"\r")[2].removeprefix(b"llava_ext: ")
                sys.stderr.buffer.write(label.encode() + b": " + shown + b"\n")
            sys.stderr.flush()
            if last:
                return
            time.sleep(0.3)
