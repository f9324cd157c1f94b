"""What the benchmarks share: interleaved runs, medians, child processes with their CPU time and peak
memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def benchmark_names() -> list[str]:
    """The benchmarks: the modules of the folder `benchmarks`."""
    return sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem[0] != "_")


def sized_parser(
    doc: str, argv: Sequence[str] | None, **sizes: tuple[float, float]
) -> argparse.ArgumentParser:
    """A command line with one option a size, each with its default and what ``--smallest`` makes of it."""
    smallest = "--smallest" in (sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (usual, least) in sizes.items():
        default = least if smallest else usual
        parser.add_argument(f"--{name}", type=type(usual), default=default, help="default: %(default)s")
    parser.add_argument("--smallest", action="store_true", help="the smallest sizes, to see that it runs")
    return parser


@dataclass(frozen=True)
class Cost:
    """Seconds of CPU and of the clock, and peak memory in MB (of children only)."""

    cpu: float
    wall: float
    peak_mb: float = 0.0


def interleaved(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, Cost]:
    """Runs each way ``repeats`` times, in turns, so that a noisy moment hits all of them; returns medians."""
    found: dict[str, list[Cost]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            cpu, wall = time.process_time(), time.perf_counter()
            result = way()
            cost = Cost(time.process_time() - cpu, time.perf_counter() - wall)
            found[name].append(result if isinstance(result, Cost) else cost)
    return {name: median(costs) for name, costs in found.items()}


def median(costs: Sequence[Cost]) -> Cost:
    """The median of each column."""
    columns = zip(*((cost.cpu, cost.wall, cost.peak_mb) for cost in costs), strict=True)
    return Cost(*(statistics.median(column) for column in columns))


def child(arguments: Sequence[str], **environment: str) -> Cost:
    """Runs a command to its end. Raises RuntimeError when it fails."""
    start = time.perf_counter()
    pid = os.posix_spawnp(
        arguments[0],
        list(arguments),
        os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        file_actions=[(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)],
    )
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise RuntimeError(
            f"{' '.join(arguments)[:300]} failed with status {os.waitstatus_to_exitcode(status)}"
        )
    return Cost(usage.ru_utime + usage.ru_stime, time.perf_counter() - start, usage.ru_maxrss / 1000)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
