"""One real run of the small configuration, shared by the tests that only look at it."""

import pytest

from tests.support.workspace import Workspace


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A working folder in which everything is finished. Treat it as read-only: `copy_to` for changes."""
    workspace = Workspace(tmp_path_factory.mktemp("finished") / "w").draw()
    workspace.output = workspace.run().stdout
    return workspace
