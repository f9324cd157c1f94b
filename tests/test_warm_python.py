"""The Python whose libraries are loaded stands for the real one: it is told and tells the same."""

import os
import signal
import subprocess
import sys

import pytest

from tests.support import warm_python
from tests.support.workspace import ROOT, wait_for

pytestmark = pytest.mark.slow
STEP = ("-m", "workflow_scripts.step", "--log", "step.log")


@pytest.fixture(params=["real", "warm"])
def python(request, tmp_path, monkeypatch):
    """Either of them, as a rule of the workflow starts it."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return warm_python.python() if request.param == "warm" else sys.executable


def run(*words):
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_arguments_folder_output_and_status(python, tmp_path):
    done = run(python, *STEP, "scan", "--nothing")
    assert done.returncode == 2 and "unrecognized arguments: --nothing" in done.stderr and not done.stdout
    assert "unrecognized arguments: --nothing" in (tmp_path / "step.log").read_text()
    assert run(python, "-m", "snakemake", "--version").stdout[0].isdigit()


def test_what_is_no_module_of_a_run_or_not_of_this_folder_is_really_started(python, monkeypatch):
    assert run(python, "-c", "import sys; print('torch' in sys.modules)").stdout == "False\n"
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert "No module named 'workflow_scripts'" in run(python, *STEP, "scan").stderr


def test_what_is_to_run_ahead_of_it_does(python, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('ahead')")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    assert "ahead" in run(python, *STEP, "scan").stderr


def test_files_follow_the_umask(python, tmp_path):
    run("sh", "-c", 'umask 027; exec "$@"', "sh", python, *STEP, "scan", "--nothing")
    assert (tmp_path / "step.log").stat().st_mode & 0o777 == 0o640


@pytest.fixture
def reading(python, tmp_path):
    """A step that waits for the rest of a file, and the end of a pipe that it reads."""
    os.mkfifo(tmp_path / "pipe")
    words = [python, *STEP, "scan", "--source", "pipe", "--manifest", "made", "--threads", "1"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        writing = wait_for(lambda: writing_end(tmp_path / "pipe"), 120, "the step", process)
        yield process
        os.close(writing)


def writing_end(pipe):
    """None as long as nobody reads."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def test_a_signal_reaches_it_and_its_end_is_told(reading):
    reading.send_signal(signal.SIGINT)
    assert "the step scan was interrupted" in reading.communicate(timeout=60)[1]
    assert reading.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_is_killed_with_who_asked_for_it(reading, number):
    """Also what reads the pipe has ended then: its output is closed."""
    reading.send_signal(number)
    reading.communicate(timeout=60)
    assert reading.returncode == -number
