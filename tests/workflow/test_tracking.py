"""W&B and trackio, where they are installed: what they keep of a training that was interrupted and went on.

It is the signal of a time limit that interrupts it. A kill loses what a tracker has not written yet: seconds
in trackio, a block of its file in W&B; `metrics.jsonl` has it.
"""

import json
import os
import signal
import sqlite3
import struct

import pytest

from tests.support.finished import LONG, attempts
from tests.support.held import PATIENCE_S, hold, wait_until_held
from tests.support.workspace import Workspace
from workflow_scripts.launch.processes import signal_tree

pytestmark = pytest.mark.slow
BLOCK, FULL, LAST = 1 << 15, 1, 4
SECRET = "0123456789abcdef" * 2 + "01234567"  # 40 digits, as W&B's keys have


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory):
    """A working folder with the data and a finished stage 1."""
    workspace = Workspace(tmp_path_factory.mktemp("stage_1") / "w").draw()
    workspace.run("data", workspace.plan().run("pretrain", "vanilla").manifest)
    return workspace


def train_with(stage_1, folder, tracker, send=os.kill):
    """A training that a signal ends once and that goes on; its workspace and its state folder."""
    workspace = stage_1.copy_to(folder)
    workspace.extra_environment = {
        "WANDB_API_KEY": SECRET,
        "HF_TOKEN": SECRET,
        "TRACKIO_DIR": str(folder / "trackio"),
    }
    workspace.config["experiments"]["long"] = {"finetune": {**LONG, "report_to": [tracker]}}
    hold(workspace, 4)
    process = workspace.start(workspace.plan().run("finetune", "long").manifest)
    state = wait_until_held(workspace, process)
    send(json.loads((state / "owner.json").read_text())["trainer"], signal.SIGTERM)
    assert process.wait(timeout=PATIENCE_S) == 0, (folder / "snakemake.out").read_text()[-4000:]
    assert [row["outcome"] for row in attempts(state)] == ["interrupted", "finished"]
    return workspace, state


def losses(state):
    rows = [json.loads(line) for line in (state / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def assert_no_secret(folder):
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert SECRET.encode() not in path.read_bytes(), path


def wandb_records(path):
    """The records of W&B's own file: LevelDB's log format, behind a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, place + 4)
        if BLOCK - place % BLOCK < 7 or kind == 0:  # the rest of a block is padding
            place += BLOCK - place % BLOCK
            continue
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def wandb_losses(path):
    found = {}
    for record in wandb_records(path):
        items = {(item.key or ".".join(item.nested_key)): item.value_json for item in record.history.item}
        if "train/loss" in items:
            found[int(json.loads(items["train/global_step"]))] = json.loads(items["train/loss"])
    return found


def test_wandb_keeps_all_attempts_as_one_run(stage_1, tmp_path):
    pytest.importorskip("wandb")
    workspace, state = train_with(stage_1, tmp_path / "w", "wandb")
    files = sorted(state.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({path.name for path in files}) == 1, "both attempts have one id"
    found = {step: loss for path in files for step, loss in wandb_losses(path).items()}
    assert found == pytest.approx(losses(state))
    runs = [record.run for path in files for record in wandb_records(path) if record.run.run_id]
    assert {run.project for run in runs} == {"llava"}
    assert {run.display_name for run in runs} == {f"finetune-{state.parent.name}-{state.name}"}
    assert not (workspace.folder / "wandb").exists()
    assert_no_secret(workspace.folder)


def test_a_signal_that_ends_wandbs_own_process_too_does_not_keep_the_training_from_saving(stage_1, tmp_path):
    """Slurm sends it to every process of the job."""
    pytest.importorskip("wandb")
    _, state = train_with(stage_1, tmp_path / "w", "wandb", signal_tree)
    assert (
        "and gets nothing more; metrics.jsonl has every step" in (state / "logs/attempt-001.log").read_text()
    )
    assert sorted(losses(state)) == list(range(1, LONG["max_steps"] + 1))


def test_trackio_goes_on_in_the_same_run(stage_1, tmp_path):
    pytest.importorskip("trackio")
    workspace, state = train_with(stage_1, tmp_path / "w", "trackio")
    with sqlite3.connect(workspace.folder / "trackio" / "llava.db") as database:
        rows = database.execute("select run_name, metrics from metrics order by id").fetchall()
    assert {name for name, _ in rows} == {f"finetune-{state.parent.name}-{state.name}"}
    contents = [json.loads(text) for _, text in rows]
    found = {row["train/global_step"]: row["train/loss"] for row in contents if "train/loss" in row}
    assert found == pytest.approx(losses(state))
    assert_no_secret(workspace.folder)
