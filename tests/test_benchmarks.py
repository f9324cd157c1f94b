"""The benchmarks run, on almost nothing; what they measure is not judged here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "row"),
    [
        ("scan", ["--images", "4", "--repeats", "1", "--seeds", "1"], "this scan"),
        ("merge", ["--scale", "0.0005", "--repeats", "1"], "this merge"),
        ("loading", ["--records", "2000", "--repeats", "1"], "this store"),
        ("preprocess", ["--images", "2", "--repeats", "1"], "llava_ext"),
        ("checkpoint", ["--hidden", "64", "--layers", "1", "--repeats", "1"], "llava_ext"),
        ("download", ["--mb", "3", "--repeats", "1"], "this download"),
    ],
)
def test_each_benchmark_prints_its_table(name, arguments, row):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert any(line.startswith(f"| {row}") for line in done.stdout.splitlines()), done.stdout
