"""A step's output goes to the terminal and to its log, and neither may stop the other or the step."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.workspace import ROOT

WRITES = """
import sys
from workflow_scripts import step
def main(arguments):
    print("x" * 200_000)
    print("last words", file=sys.stderr)
    raise SystemExit(3)
sys.modules["workflow_scripts.writes"] = type(sys)("writes")
sys.modules["workflow_scripts.writes"].main = main
step.main(["--log", sys.argv[1], "writes", ""])
"""


def run_step(log, **streams):
    command = [sys.executable, "-c", WRITES, str(log)]
    return subprocess.run(command, cwd=ROOT, timeout=60, check=False, **streams)


def test_both_get_everything_and_the_log_is_named(tmp_path):
    log = tmp_path / "deep/step.log"
    done = run_step(log, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert done.returncode == 3
    assert done.stderr == log.read_bytes()
    assert done.stderr.endswith(f"failed with status 3; its log: {log}\n".encode())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_the_log_keeps_neither_the_step_nor_the_message(tmp_path):
    done = run_step("/dev/full", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert done.returncode == 3
    assert b"last words" in done.stderr and len(done.stderr) > 200_000


def test_a_terminal_that_is_gone_does_not_end_the_log(tmp_path):
    with Path("/dev/full").open("wb") as gone:
        done = run_step(tmp_path / "log", stdout=subprocess.DEVNULL, stderr=gone)
    assert done.returncode == 3 and b"last words" in (tmp_path / "log").read_bytes()
