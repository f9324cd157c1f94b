"""Runs every benchmark in a process of its own: `python -m benchmarks [--smallest]`."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.support.measure import ROOT, benchmark_names


def main(arguments: list[str]) -> None:
    """Runs them one after the other, each with ``arguments``; ends with the first that fails."""
    for name in benchmark_names():
        print(f"\n== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
        if status := subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise SystemExit(f"the benchmark {name} failed with status {status}")


if __name__ == "__main__":
    main(sys.argv[1:])
