"""A private Slurm for the tests of this folder, a working folder that is finished by it, and one that goes on
with it.
"""

import json
import re
from pathlib import Path

import pytest

from tests.slurm.sandbox import missing, running
from tests.support import warm_python
from tests.support.finished import LONG
from tests.support.workspace import Workspace, copy_code

HERE = Path(__file__).parent
# Real clusters wait longer before the first question; the tests' Snakemake asks every second
# (quick_snakemake.py).
OPTIONS = ["--profile", "slurm", "--slurm-init-seconds-before-status-checks", "1"]


def pytest_collection_modifyitems(items):
    """Marks the tests of this folder, and has its files begin first: they are the longest. Behind them comes
    another long one that waits for no fixture of all processes.
    """
    items.sort(key=lambda item: (HERE not in Path(item.fspath).parents, item.path.name != "test_shipped.py"))
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
    return through_slurm(Workspace(folder), sandbox).draw()


def through_slurm(workspace, sandbox):
    """The same working folder with the code in it and a Slurm to run on."""
    copy_code(workspace.folder)
    snakemake = [str(HERE / "quick_snakemake.py")]
    found = Workspace(workspace.folder, workspace.folder, OPTIONS, snakemake, sandbox.environment)
    found.config = workspace.config
    return found


@pytest.fixture(scope="session")
def finished_on_slurm(slurm, tmp_path_factory):
    """The small configuration, all of it by Slurm's jobs, whose steps have their libraries loaded."""
    workspace = clone(tmp_path_factory.mktemp("slurm") / "clone", slurm)
    del workspace.config["experiments"]["gentle"]
    workspace.config["python"] = warm_python.python(workspace.code)
    workspace.output = workspace.run(timeout=1400).stdout
    del workspace.config["python"]
    return workspace


@pytest.fixture(scope="session")
def ready(finished, slurm, tmp_path_factory):
    """What was finished on this machine without Slurm; it goes on with it."""
    return through_slurm(finished.copy_to(tmp_path_factory.mktemp("ready") / "w"), slurm)


def training(ready, folder, compute=(), **stage):
    """A copy of a finished folder with one more stage 2 to train."""
    workspace = ready.copy_to(folder / "w")
    workspace.config["compute"]["small"].update(dict(compute))
    workspace.config["experiments"]["long"] = {"finetune": {**LONG, **stage}}
    return workspace


def job_of(state):
    """The Slurm job that holds a training."""
    return json.loads((state / "owner.json").read_text())["job"]


def submitted(output, rule):
    """The Slurm jobs of a rule, in the order of their submission."""
    logs = re.findall(rf"SLURM jobid (\d+) \(log: \S*/rule_{rule}/", output)
    return list(dict.fromkeys(logs))
