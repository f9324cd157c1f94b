"""`pytest tests/golden --reference FOLDER`: compares everything with the golden vectors in FOLDER.

Without the option it uses the small copy in `data/`, so that a plain clone is tested too (`make_data.py` says
what that leaves out). At the end the largest difference per recording is printed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from . import reference


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reference",
        metavar="FOLDER",
        help="folder of golden vectors to compare with (default: tests/golden/data)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[reference.DIFFERENCES] = {}
    root = reference.folder(config)
    if not (root / "text").is_dir():
        raise pytest.UsageError(f"--reference {root}: no golden vectors there (no folder `text`)")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The vectors were recorded with one thread; sums in another order differ in the last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def root(request: pytest.FixtureRequest) -> Path:
    """The folder of golden vectors."""
    return reference.folder(request.config)


@pytest.fixture
def report_difference(request: pytest.FixtureRequest) -> Callable[[str, float, float], None]:
    """``report_difference(name, value, bound)``: fails if value > bound (or is NaN) and lists the largest
    value at the end.
    """
    seen = request.config.stash[reference.DIFFERENCES]

    def report(name: str, value: float, bound: float) -> None:
        known = seen.get(name, (0.0, bound))[0]
        seen[name] = (float("inf") if math.isnan(value) else max(known, float(value)), bound)
        assert value <= bound, f"{name}: differs by {value:.3g}, allowed is {bound:.3g}"

    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    seen = config.stash.get(reference.DIFFERENCES, {})
    if not seen:
        return
    terminalreporter.section(f"largest differences from {reference.folder(config)}")
    width = max(map(len, seen))
    for name, (value, bound) in sorted(seen.items()):
        terminalreporter.write_line(f"{name:<{width}}  {value:9.2e}  (allowed {bound:.0e})")
    worst = max(seen, key=lambda name: seen[name][0] / max(seen[name][1], 1e-300))
    terminalreporter.write_line(f"{len(seen)} comparisons; closest to its bound: {worst}")
