"""Shows what the trainings are doing, from their folders alone: `python -m workflow_scripts.status [--watch]`.

One line a training: stage, run, state, step, loss, tokens a second, time left, time since the last step, attempts, GPUs, last
saved step, machine or job, and the finished experiments that use it. Below one that failed, or that a check refused to start:
why, and where its log is.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from workflow_scripts.command_line import command_line
from workflow_scripts.io import UserError, user_errors
from workflow_scripts.status.read import all_statuses
from workflow_scripts.status.table import table


@contextmanager
def redrawing() -> Iterator[None]:
    """Hides the cursor of a terminal, and ends with Ctrl-C without a traceback, the cursor back."""
    shown = sys.stdout.isatty()
    print("\033[?25l\033[2J" if shown else "", end="")
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        print("\033[?25h" if shown else "", end="", flush=True)


def draw(text: str) -> None:
    """Writes over what stands on a terminal, line by line, so that it does not flicker; elsewhere writes below it."""
    if not sys.stdout.isatty():
        print(text, flush=True)
        return
    width, height = shutil.get_terminal_size()
    lines = [line[:width] for line in text.splitlines()]
    height -= 1
    if len(lines) > height:  # the newest are last, and the sum
        lines = [lines[0], f"... {len(lines) - height + 1} lines more", *lines[len(lines) - height + 2 :]]
    sys.stdout.write("\033[H" + "".join(f"{line}\033[K\n" for line in lines) + "\033[J")
    sys.stdout.flush()


def render(root: Path, as_json: bool) -> str:
    """All trainings as text, as wide as the terminal allows, or one JSON object a line."""
    found = all_statuses(root)
    if as_json:
        return "\n".join(json.dumps(asdict(item)) for item in found)
    return table(found, shutil.get_terminal_size().columns if sys.stdout.isatty() else None)


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
        if not (options.directory / "runs").is_dir():
            raise UserError(
                f"{options.directory.absolute()}: no folder runs/ here; give the working folder with --directory"
            )
        if not options.watch:
            print(render(options.directory, options.json), flush=True)
            return
        with redrawing():
            while True:
                draw(render(options.directory, options.json))
                time.sleep(options.watch)


if __name__ == "__main__":
    main()
