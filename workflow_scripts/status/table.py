"""The state of all trainings as a table that fits its content, and the terminal where there is one."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from workflow_scripts.status.read import Status

# In the order of the sum, with their colours.
STATES = {
    "running": "green",
    "starting": "green",
    "queued": "yellow",
    "held": "red",
    "unknown": "yellow",
    "not started": "dim",
    "interrupted": "yellow",
    "killed": "red",
    "failed": "red",
    "verdict": "red",
    "ended": "dim",
    "refused": "red",
    "unreadable": "red",
    "finished": "blue",
}
SHORTEST_NAME = 12
UNLIMITED = 100_000
"""The width of what is no terminal."""


@dataclass(frozen=True)
class Column:
    """What a training shows under a title. Narrow terminals go without the column of the lowest ``worth``
    first; 0 stays.
    """

    title: str
    cell: Callable[[Status], str]
    worth: int = 0
    right: bool = True


def duration(seconds: float | None) -> str:
    """`3:05:09`, `5:09`, `9s`, or nothing."""
    if seconds is None:
        return ""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def share(value: float | None) -> str:
    """`12%`, or nothing."""
    return "" if value is None else f"{value:.0%}"


def throughput(item: Status) -> str:
    """TFLOP/s of each device and, where its peak is known, the share of that: `412 (42%)`."""
    if item.tflop_per_s is None:
        return ""
    digits = 0 if item.tflop_per_s >= 10 else 3
    return " ".join(
        [f"{item.tflop_per_s:.{digits}f}", *([f"({share(item.peak_share)})"] if item.peak_share else [])]
    )


COLUMNS = (
    Column("stage", lambda item: item.stage, 7, right=False),
    Column("run", lambda item: item.run, right=False),
    Column("state", lambda item: item.state, right=False),
    Column("step", lambda item: f"{item.step}/{item.steps}" if item.steps else str(item.step)),
    Column("loss", lambda item: "" if item.loss is None else f"{item.loss:.4f}"),
    Column("tok/s", lambda item: "" if item.tokens_per_s is None else f"{item.tokens_per_s:.0f}", 5),
    Column("TFLOP/s", lambda item: throughput(item), 4),
    Column("wait", lambda item: share(item.data_wait_share), 3),
    Column("left", lambda item: duration(item.eta_s)),
    Column("idle", lambda item: duration(item.idle_s)),
    Column("try", lambda item: str(item.attempts), 4),
    Column("gpus", lambda item: item.gpus, 6),
    Column("saved", lambda item: str(item.saved_step), 3),
    Column("where", lambda item: item.where, 2, right=False),
    Column("experiments", lambda item: ", ".join(item.experiments), 1, right=False),
)


def shorten(name: str, width: int) -> str:
    """A name without its middle: its end is the run's key."""
    if len(name) <= width:
        return name
    end = min(11, width // 2)
    return f"{name[: width - end - 1]}…{name[len(name) - end :]}"


@dataclass(frozen=True)
class Trainings:
    """One line a training, below it why it failed, the sum last; columns that are empty for all are left
    out.
    """

    statuses: Sequence[Status]
    notes: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.statuses:
            rows = console.render_lines(self._fit(console, options), options, pad=False)
            yield from (*rows[0], Segment.line())
            for item, row in zip(self.statuses, rows[1:], strict=True):
                yield from (*row, Segment.line())
                if item.reason:
                    yield Text(f"    {item.reason}", no_wrap=True, overflow="ellipsis")
                if item.log:
                    # Not Text: a path that is broken into lines can't be copied.
                    yield from (Segment(f"    log: {item.log}"), Segment.line())
        yield Text(summary(self.statuses))
        yield from map(Text, self.notes)

    def _fit(self, console: Console, options: ConsoleOptions) -> Table:
        """Leaves out what can be spared, then shortens the runs' names in their middle, until a line fits."""
        found = [column for column in COLUMNS if any(column.cell(item) for item in self.statuses)]
        grid = self._grid(found)
        longest = max(len(item.run) for item in self.statuses)
        while (spare := Measurement.get(console, _unlimited(options), grid).maximum - options.max_width) > 0:
            spared = min(
                (column for column in found if column.worth), key=lambda column: column.worth, default=None
            )
            if spared is None:
                return self._grid(found, max(SHORTEST_NAME, longest - spare))
            found.remove(spared)
            grid = self._grid(found)
        return grid

    def _grid(self, columns: Sequence[Column], longest: int = UNLIMITED) -> Table:
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in columns:
            grid.add_column(column.title, justify="right" if column.right else "left", no_wrap=True)
        for item in self.statuses:
            grid.add_row(*(_cell(column, item, longest) for column in columns))
        return grid


def _unlimited(options: ConsoleOptions) -> ConsoleOptions:
    return options.update(width=UNLIMITED)


def _cell(column: Column, item: Status, longest: int) -> Text:
    text = column.cell(item)
    if column.title == "run":
        text = shorten(text, longest)
    return Text(text, style=STATES.get(item.state, "") if column.title == "state" else "")


def summary(statuses: Sequence[Status]) -> str:
    """`1 running, 2 finished`."""
    counted = Counter(item.state for item in statuses)
    return ", ".join(f"{counted[state]} {state}" for state in STATES if counted[state]) or "no training yet"


def table(statuses: Sequence[Status], width: int | None = None, notes: Sequence[str] = ()) -> str:
    """The statuses as plain text, as wide as they are or at most ``width``."""
    console = Console(file=io.StringIO(), width=width or UNLIMITED, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(Trainings(statuses, notes), highlight=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
