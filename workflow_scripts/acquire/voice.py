"""What a download says: progress while bytes come, what it waits for while none do. No secret is said."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Any

from workflow_scripts.disk import size_text
from workflow_scripts.secrets import redact

PROGRESS_S = 10.0


def say(text: str) -> None:
    """One line on stderr."""
    print(redact(text), file=sys.stderr, flush=True)


class Voice:
    """Speaks for one file, from a `with` block's beginning to its end.

    At least every ``every_s`` seconds a line (on a terminal: a bar) says what goes on. The same thread hangs
    up on servers that keep a connection open without coming to the point, see :meth:`expect`.
    """

    def __init__(self, name: str, every_s: float = 30.0, tick_s: float = 1.0) -> None:
        self.name, self.every_s = name, every_s
        self.tick_s = min(tick_s, every_s / 2)
        self.what = "starting"
        self.since = self.spoke = time.monotonic()
        self.bar: Any = None
        self.total: int | None = None
        self.done = self.begin = 0
        self._limit: tuple[socket.socket, float] | None = None
        self._closed = threading.Event()

    def __enter__(self) -> Voice:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._close_bar()

    # -- words

    def say(self, text: str) -> None:
        """A line about this file."""
        self.spoke = time.monotonic()
        say(f"{self.name}: {text}")

    def set_activity(self, what: str) -> None:
        """Sets what is said when nothing else is said for a while."""
        self.what, self.since = what, time.monotonic()

    def _watch(self) -> None:
        while not self._closed.wait(self.tick_s):
            now = time.monotonic()
            if now - self.spoke >= self.every_s:
                self.say(f"{self.what}, for {now - self.since:.0f} s")
            if self._limit is not None and now > self._limit[1]:
                # The plain socket's: TLS would want to say goodbye first.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self._limit[0], socket.SHUT_RDWR)
                self._limit = None

    def expect(self, connection: socket.socket | None, seconds: float) -> None:
        """Hangs up unless this is called again, or :meth:`relax`, within ``seconds``."""
        self._limit = None if connection is None else (connection, time.monotonic() + seconds)

    def relax(self) -> None:
        """Nothing is expected any more."""
        self._limit = None

    # -- bytes

    def start(self, done: int, total: int | None) -> None:
        """Goes on at ``done`` of ``total`` bytes."""
        self.set_activity("receiving")
        self.done = self.begin = done
        self.total, self.spoke = total, time.monotonic()
        self._close_bar()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=total, initial=done, unit="B", unit_scale=True, desc=self.name, dynamic_ncols=True
            )

    def add(self, count: int) -> None:
        """``count`` more bytes are on the disk."""
        self.done += count
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(count)
            self.spoke = now
        elif now - self.spoke >= min(PROGRESS_S, self.every_s):
            self.say(self._line(now))

    def _line(self, now: float) -> str:
        rate = (self.done - self.begin) / max(now - self.since, 1e-9)
        speed = f"{rate / 1e6:.1f} MB/s" if rate >= 1e5 else f"{rate / 1e3:.1f} kB/s"
        if not self.total:
            return f"{size_text(self.done)}, {speed}"
        left = (self.total - self.done) / max(rate, 1.0)
        share = f"{100 * self.done / self.total:.0f} %"
        return (
            f"{size_text(self.done)} of {size_text(self.total)} ({share}), {speed}, {left / 60:.1f} min left"
        )

    def _close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
