"""Every benchmark runs at its smallest size; what they measure is not judged here."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from benchmarks.support.measure import ROOT, benchmark_names


@pytest.mark.slow
@pytest.mark.parametrize("name", benchmark_names())
def test_each_benchmark_prints_its_table(name):
    """A module that takes no ``--smallest`` or prints no table of measured rows is no benchmark, and fails
    here.
    """
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smallest"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\|(-+\|)+\n\| .*\d.*\|\n\| ", done.stdout, re.MULTILINE), done.stdout


def test_make_bench_runs_all_of_them():
    bench = (ROOT / "Makefile").read_text().partition("\nbench:")[2]
    assert bench.splitlines()[1].endswith("python -m benchmarks")
    assert {"scan", "merge", "packing"} <= set(benchmark_names())
