"""The state of all trainings as a text table that fits its content, and the terminal where there is one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workflow_scripts.status.read import Status

STATES = (
    "running",
    "unknown",
    "not started",
    "interrupted",
    "killed",
    "failed",
    "refused",
    "unreadable",
    "finished",
)
# What a narrow terminal goes without, first of all the first.
EXPENDABLE = ("experiments", "where", "saved", "try", "tok/s", "gpus", "stage")
SHORTEST_NAME = 12
GAP = "  "


@dataclass(frozen=True)
class Column:
    """A title, one cell a training, and whether they stand on the right."""

    title: str
    cells: Sequence[str]
    right: bool = True

    @property
    def width(self) -> int:
        """As wide as the widest cell."""
        return max(len(cell) for cell in (self.title, *self.cells))

    def line(self, row: int) -> str:
        """The cell of a row, or the title (-1), at the column's width."""
        cell = self.title if row < 0 else self.cells[row]
        return f"{cell:>{self.width}}" if self.right else f"{cell:<{self.width}}"


def duration(seconds: float | None) -> str:
    """`3:05:09`, `5:09`, `9s`, or nothing."""
    if seconds is None:
        return ""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def columns(statuses: Sequence[Status]) -> list[Column]:
    """Everything that is shown; what is empty for all is left out."""
    every = [
        Column("stage", [item.stage for item in statuses], right=False),
        Column("run", [item.run for item in statuses], right=False),
        Column("state", [item.state for item in statuses], right=False),
        Column("step", [f"{item.step}/{item.steps}" if item.steps else str(item.step) for item in statuses]),
        Column("loss", ["" if item.loss is None else f"{item.loss:.4f}" for item in statuses]),
        Column(
            "tok/s", ["" if item.tokens_per_s is None else f"{item.tokens_per_s:.0f}" for item in statuses]
        ),
        Column("left", [duration(item.eta_s) for item in statuses]),
        Column("idle", [duration(item.idle_s) for item in statuses]),
        Column("try", [str(item.attempts) for item in statuses]),
        Column("gpus", [item.gpus for item in statuses]),
        Column("saved", [str(item.saved_step) for item in statuses]),
        Column("where", [item.where for item in statuses], right=False),
        Column("experiments", [", ".join(item.experiments) for item in statuses], right=False),
    ]
    return [column for column in every if any(column.cells)]


def fit(found: list[Column], width: int) -> list[Column]:
    """Leaves out what can be spared, then shortens the runs' names in their middle, until a line is that wide."""
    for title in EXPENDABLE:
        if _total(found) <= width:
            return found
        found = [column for column in found if column.title != title]
    spare = _total(found) - width
    if spare <= 0:
        return found
    longest = max(SHORTEST_NAME, next(column.width for column in found if column.title == "run") - spare)
    return [
        Column("run", [shorten(cell, longest) for cell in column.cells], False)
        if column.title == "run"
        else column
        for column in found
    ]


def _total(found: Sequence[Column]) -> int:
    return sum(column.width + len(GAP) for column in found) - len(GAP)


def shorten(name: str, width: int) -> str:
    """A name without its middle: its end is the run's key."""
    if len(name) <= width:
        return name
    end = min(11, width // 2)
    return f"{name[: width - end - 1]}…{name[len(name) - end :]}"


def summary(statuses: Sequence[Status]) -> str:
    """`1 running, 2 finished`."""
    counted = Counter(item.state for item in statuses)
    return ", ".join(f"{counted[state]} {state}" for state in STATES if counted[state]) or "no training yet"


def table(statuses: Sequence[Status], width: int | None = None) -> str:
    """The statuses as text: one line each, why it failed below, the sum last. ``width``: of the terminal."""
    if not statuses:
        return summary(statuses)
    found = columns(statuses) if width is None else fit(columns(statuses), width)
    lines = [GAP.join(column.line(-1) for column in found).rstrip()]
    for row, item in enumerate(statuses):
        lines.append(GAP.join(column.line(row) for column in found).rstrip())
        if item.reason:
            lines += _cut([f"    {item.reason}"], width)
        if item.log:
            lines.append(f"    log: {item.log}")
    return "\n".join([*lines, summary(statuses)])


def _cut(lines: list[str], width: int | None) -> list[str]:
    return [line if width is None or len(line) <= width else f"{line[: width - 1]}…" for line in lines]
