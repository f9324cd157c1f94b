"""What all tests share."""

import gc
import os
import shutil
import signal
import tempfile
import threading

import pytest

from tests.support import warm

# What several rooms' tests need is made once: the demo's models and pictures, a finished working folder.
pytest_plugins = ["tests.support.demo", "tests.support.finished"]


def pytest_configure(config):
    """Little is looked at for garbage: libraries make objects by the million, and all of them stay. A shell's
    background job ignores SIGINT, and all that it starts: tests that send one must not depend on it.
    """
    gc.set_threshold(10_000)
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        os.environ |= {warm.FOLDER: tempfile.mkdtemp(prefix="warm-"), warm.OWNER: str(os.getpid())}


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ[warm.FOLDER], ignore_errors=True)  # which its servers end with


def pytest_collection_finish():
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Tests of a GPU say where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch can use none here"))


@pytest.fixture
def small_files(tmp_path, monkeypatch):
    """The files that the small configuration (tests/support/workspace.py) names lie in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("images.tar", "questions.json"):
        (tmp_path / "mine" / name).touch()
