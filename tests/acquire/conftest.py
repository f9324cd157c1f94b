"""Fixtures of the data tests: servers with faults."""

from __future__ import annotations

import pytest

from tests.support.servers import HubServer, Server
from workflow_scripts.acquire.patience import Patience


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
