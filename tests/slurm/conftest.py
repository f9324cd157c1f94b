"""One private Slurm for all tests of this folder, and one folder in which the small configuration went
through it.
"""

from pathlib import Path

import pytest

from tests.slurm.sandbox import missing, running
from tests.support.workspace import Workspace, copy_code

HERE = Path(__file__).parent
# Real clusters wait longer before the first question; the tests' Snakemake asks every second
# (quick_snakemake.py).
OPTIONS = ["--profile", "slurm", "--slurm-init-seconds-before-status-checks", "1"]


def pytest_collection_modifyitems(items):
    lacking = missing(accounting=True)
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(pytest.mark.slurm)
            if lacking:
                item.add_marker(pytest.mark.skip(reason=f"Slurm is not installed: {', '.join(lacking)}"))


@pytest.fixture(scope="session")
def slurm():
    with running() as sandbox:
        yield sandbox


def clone(folder, sandbox):
    """A fresh clone as working folder: all there is to type in it is `snakemake --profile slurm`."""
    copy_code(folder)
    return Workspace(folder, folder, OPTIONS, [str(HERE / "quick_snakemake.py")], sandbox.environment).draw()


@pytest.fixture(scope="session")
def finished_on_slurm(slurm, tmp_path_factory):
    workspace = clone(tmp_path_factory.mktemp("slurm") / "clone", slurm)
    workspace.output = workspace.run().stdout
    return workspace
