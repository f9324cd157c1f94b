"""Fixtures of the data tests: servers with faults."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from servers import HubServer, Server

from workflow_scripts.download import Patience

# The scale test uses the benchmarks' data.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture
def server():
    with Server().running() as running:
        yield running


@pytest.fixture
def other_server():
    with Server().running() as running:
        yield running


@pytest.fixture
def hub():
    with HubServer().running() as running:
        yield running


@pytest.fixture
def patience():
    """Short pauses; the real ones are the same code with larger numbers."""
    return Patience(attempts=3, backoff_s=0.01, max_backoff_s=0.05, connect_s=2, read_s=0.5)
