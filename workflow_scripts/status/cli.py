"""Shows what the trainings are doing, from their folders and Slurm's queue: `python -m
workflow_scripts.status [--watch]`.

One line a training: stage, run, state, step, loss, tokens a second, time left, time since the last step,
attempts, GPUs, last saved step, machine or job, and the finished experiments that use it. Below one that
failed, or that a check refused to start: why, and where its log is. Below one that waits in Slurm's queue:
since when, why, and what to do where waiting does not help. Last, the experiments whose checkpoints were not
trained here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment

from workflow_scripts.command_line import command_line
from workflow_scripts.io import UserError, user_errors
from workflow_scripts.status.queue import jobs_of, with_queue
from workflow_scripts.status.read import Status, adopted, all_statuses
from workflow_scripts.status.table import Trainings, table


@dataclass(frozen=True)
class Tail:
    """As much as the terminal has lines for: the titles, and the last trainings with the sum."""

    content: Trainings

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.content, options, pad=False)
        most = console.height - 1
        if len(lines) > most:
            left_out = [Segment(f"... {len(lines) - most + 1} lines more")]
            lines = [lines[0], left_out, *lines[len(lines) - most + 2 :]]
        for line in lines:
            yield from (*line, Segment.line())


def trainings(root: Path) -> list[Status]:
    """What the folders say, and Slurm of those that wait in its queue."""
    return with_queue(all_statuses(root), root)


def as_json(root: Path) -> str:
    """One JSON object a training and line."""
    return "\n".join(json.dumps(asdict(item)) for item in trainings(root))


def show(root: Path, console: Console) -> None:
    """Prints the table: as wide as the terminal allows, or plain and as wide as it is elsewhere."""
    if console.is_terminal:
        console.print(Trainings(trainings(root), adopted(root)), highlight=False)
    else:
        print(table(trainings(root), notes=adopted(root)), flush=True)


def watch(root: Path, console: Console, seconds: float) -> None:
    """Redraws the table in place until Ctrl-C."""
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            live.update(Tail(Trainings(trainings(root), adopted(root))), refresh=True)
            time.sleep(seconds)


def run(root: Path, seconds: float | None, json_lines: bool) -> None:
    """Shows the trainings once, or every so many seconds: in place where that can be, else below."""
    console = Console(force_terminal=sys.stdout.isatty())
    if seconds and not json_lines and console.is_terminal and not console.is_dumb_terminal:
        watch(root, console, seconds)
    while True:
        if json_lines:
            print(as_json(root), flush=True)
        else:
            show(root, console)
        if not seconds:
            return
        time.sleep(seconds)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table once, again and again, or as JSON."""
    parser = command_line("status", __doc__)
    parser.add_argument("--directory", type=Path, default=Path(), help="the working folder")
    parser.add_argument(
        "--watch", type=float, nargs="?", const=5.0, metavar="SECONDS", help="again every so many seconds"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a training")
    options = parser.parse_args(argv)
    with user_errors():
        if not (options.directory / "runs").is_dir() and not jobs_of(options.directory):
            raise UserError(
                f"{options.directory.absolute()}: no folder runs/ here; give the working folder with"
                " --directory"
            )
        with suppress(KeyboardInterrupt):
            run(options.directory, options.watch, options.json)


if __name__ == "__main__":
    main()
