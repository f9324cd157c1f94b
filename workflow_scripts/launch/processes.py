"""Processes of this machine: whether one still lives, and all that it has started."""

from __future__ import annotations

import os
from pathlib import Path


def process_start(pid: int) -> str | None:
    """When a process started (clock ticks since boot), so that a reused pid is not taken for it; None when
    it is dead.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def descendants(pid: int) -> list[int]:
    """All living processes below ``pid``, whatever their session."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] not in ("Z", "X"):
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def signal_tree(pid: int, number: int) -> None:
    """Sends a signal to everything below ``pid`` and to ``pid`` itself."""
    for target in [*descendants(pid), pid]:
        try:
            os.kill(target, number)
        except ProcessLookupError:
            continue
