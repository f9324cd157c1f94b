"""How long a download tries, and when it has tried enough. Every wait has an end."""

from __future__ import annotations

import contextlib
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from workflow_scripts.acquire.answers import MirrorFailed
from workflow_scripts.disk import size_text

LONGEST_WAIT_S = 3600.0


@dataclass(frozen=True)
class Patience:
    """How long to try."""

    attempts: int = 8
    """Attempts in a row that bring no new byte."""
    restarts: int = 8
    """How often one URL's file may be started over: one that changes all the time can't be fetched."""
    backoff_s: float = 1.0
    """First pause after a failure; each is twice as long as the one before."""
    max_backoff_s: float = 120.0
    connect_s: float = 20.0
    read_s: float = 60.0
    """Without a byte."""
    answer_s: float = 90.0
    """From the request to the end of the headers, redirects included; a server may send them byte by byte."""
    least_rate: float = 1000.0
    """Bytes a second that have to come on average over ``window_s``; fewer end the patience with a URL."""
    window_s: float = 600.0
    say_s: float = 30.0
    """At least this often a line says what is waited for."""
    per_host: int = 2
    hosts: Path | None = None
    """Folder for the locks that limit connections per host among all processes; None: no limit."""

    @property
    def tick_s(self) -> float:
        """How exactly the bounds are kept."""
        return min(1.0, self.answer_s / 4)

    def pause(self, failures: int, asked: float | None) -> float:
        """Seconds to wait after so many failures in a row: what the server asks for, but not less than
        ours.
        """
        own = min(self.backoff_s * 2 ** max(0, failures - 1), self.max_backoff_s)
        return max(own * (0.5 + random.random() / 2), asked or 0.0)


class Pace:
    """Whether enough bytes come."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.begin, self.bytes = time.monotonic(), 0

    def add(self, count: int) -> None:
        """Notes bytes that came. Raises :class:`MirrorFailed` when too few came for too long."""
        self.bytes += count
        needed = self.patience.least_rate * self.patience.window_s
        if self.bytes >= needed:
            self.begin, self.bytes = time.monotonic(), 0
        elif time.monotonic() - self.begin > self.patience.window_s:
            raise MirrorFailed(
                f"only {size_text(self.bytes)} came in {self.patience.window_s:.0f} s, less than "
                f"{self.patience.least_rate:.0f} bytes a second"
            )

    def discount(self, seconds: float) -> None:
        """Waiting that is not the server's fault, or that it asked for."""
        self.begin += seconds


def retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After header asks for (a number or a date), at most an hour."""
    if not value:
        return None
    if value.strip().isdecimal():
        return min(float(value), LONGEST_WAIT_S)
    with contextlib.suppress(ValueError, TypeError):
        wait = (parsedate_to_datetime(value) - (now or datetime.now(UTC))).total_seconds()
        return min(max(wait, 0.0), LONGEST_WAIT_S)
    return None
