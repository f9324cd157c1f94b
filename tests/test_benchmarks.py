"""Every benchmark runs at its smallest size; what they measure is not judged here."""

from __future__ import annotations

import os
import re

import pytest

from benchmarks.support.measure import ROOT, benchmark_names
from tests.support import warm


@pytest.mark.slow
@pytest.mark.parametrize("name", benchmark_names())
def test_each_benchmark_prints_its_table(name, tmp_path):
    """A module that takes no ``--smallest`` or prints no table of measured rows is no benchmark, and fails
    here.
    """
    log, tests_own = tmp_path / "log", (warm.FOLDER, warm.OWNER)
    environment = {key: value for key, value in os.environ.items() if key not in tests_own}
    status = warm.run(f"benchmarks.{name}", ["--smallest"], log, ROOT, environment, timeout=300)
    said = log.read_text()
    assert status == 0, said
    assert re.search(r"^\|(-+\|)+\n\| .*\d.*\|\n\| ", said, re.MULTILINE), said


def test_make_bench_runs_all_of_them():
    bench = (ROOT / "Makefile").read_text().partition("\nbench:")[2]
    assert bench.splitlines()[1].endswith("python -m benchmarks")
    assert {"scan", "merge", "packing"} <= set(benchmark_names())
