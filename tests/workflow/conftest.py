"""One real run of the small configuration, shared by the tests that only look at it."""

import os

import pytest
from filelock import FileLock

from tests.support.workspace import Workspace


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A working folder in which everything is finished, one for all test processes. Treat it as read-only:
    `copy_to` for changes.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    workspace, output = Workspace(shared / "finished" / "w"), shared / "finished.out"
    with FileLock(shared / "finished.lock"):
        if not output.exists():
            output.write_text(workspace.draw().run().stdout)
    workspace.output = output.read_text()
    return workspace
