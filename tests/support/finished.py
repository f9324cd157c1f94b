"""One real run of the small configuration, and one training that nothing interrupts, shared by all test
processes.
"""

import json
import os
from pathlib import Path

import pytest
from filelock import FileLock

from tests.support.workspace import Workspace

# the same steps on any number of processes; tests that interrupt it hold it (held.py)
LONG = {"max_steps": 12, "save_steps": 3, "global_batch_size": 16, "loss_normalization": "token"}
LONG_CHECKPOINT = "experiments/long/checkpoint.json"


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder of all test processes of this run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def finished(shared):
    """A working folder in which everything is finished. Treat it as read-only: `copy_to` for changes."""
    workspace, output = Workspace(shared / "finished" / "w", warm=True), shared / "finished.out"
    with FileLock(shared / "finished.lock"):
        if not output.exists():
            output.write_text(workspace.draw().run(timeout=1400).stdout)
    workspace.output = output.read_text()
    return workspace


@pytest.fixture(scope="session")
def straight(finished, shared):
    """Losses and digest of the training `long` when nothing interrupts it."""
    found = shared / "straight.json"
    with FileLock(shared / "straight.lock"):
        if not found.exists():
            workspace = with_long(finished, shared / "straight")
            workspace.run(long_manifest(workspace))
            found.write_text(json.dumps(outcome_of(workspace)))
    return tuple(json.loads(found.read_text()))


def with_long(finished, folder: Path, code: Path | None = None) -> Workspace:
    """A copy of the finished folder with the experiment `long` to train."""
    workspace = finished.copy_to(folder, code)
    workspace.config["experiments"]["long"] = {"finetune": dict(LONG)}
    return workspace


def long_manifest(workspace):
    """What the training `long` leaves when it is finished; nothing is exported for it."""
    return workspace.plan().run("finetune", "long").manifest


def outcome_of(workspace):
    """Losses and digest of the finished training `long`."""
    return losses(workspace.state("finetune", "long")), workspace.json(long_manifest(workspace))["digest"]


def manifests(workspace):
    """What every manifest says, by its place in the working folder."""
    folder = workspace.folder
    found = [*folder.glob("data/*/*/manifest.json"), *folder.glob("models/*/manifest.json")]
    found += [*folder.glob("runs/*/*/manifest.json"), *folder.glob("experiments/*/checkpoint.json")]
    return {str(path.relative_to(folder)): json.loads(path.read_text()) for path in found}


def attempts(state):
    """What is known of each start of a training."""
    rows = {}
    path = state / "attempts.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        rows.setdefault(row["attempt"], {}).update(row)
    return list(rows.values())


def losses(state):
    """The loss of every step."""
    rows = [json.loads(line) for line in (state / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "steps are missing or doubled"
    return [row["loss"] for row in rows]
