"""A run that is killed, whatever is killed, continues from what was saved."""

import getpass
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from tests.support.finished import (
    LONG,
    LONG_CHECKPOINT,
    attempts,
    long_manifest,
    losses,
    outcome_of,
    with_long,
)
from tests.support.held import PATIENCE_S, hold, wait_until_held
from tests.support.workspace import kill_group, spoil_a_picture, wait_for
from workflow_scripts.end import find_run
from workflow_scripts.io import UserError
from workflow_scripts.status.read import read_status

pytestmark = pytest.mark.slow


@pytest.fixture()
def workspace(finished, tmp_path):
    """A finished folder with one more experiment to train."""
    return with_long(finished, tmp_path / "w")


def test_killed_snakemake_and_killed_trainer_continue_to_the_same_weights(workspace, straight):
    hold(workspace, 4, attempts=2)
    process = workspace.start(LONG_CHECKPOINT)
    state = wait_until_held(workspace, process)
    trainer = json.loads((state / "owner.json").read_text())["trainer"]
    os.kill(trainer, signal.SIGKILL)  # Snakemake starts the job again by itself
    wait_until_held(workspace, process, attempt=2)
    first, second = attempts(state)
    assert first["outcome"] == "failed (-9)" and second["from_step"] == 3

    unlocked = workspace.run("--unlock", check=False)
    assert unlocked.returncode != 0 and f"process {process.pid} on " in unlocked.stdout
    thief = workspace.run(LONG_CHECKPOINT, "--nolock", "--retries", "0", check=False)
    assert f"process {process.pid} on " in thief.stdout and "it is left alone here" in thief.stdout
    locked = workspace.run(LONG_CHECKPOINT, check=False)
    assert f"the folder is locked: {getpass.getuser()}'s Snakemake (process {process.pid} on" in locked.stdout
    assert "--unlock" not in locked.stdout and "Traceback" not in locked.stdout + thief.stdout
    kill_group(process)  # Snakemake dies, its job goes on

    done = workspace.run(LONG_CHECKPOINT)
    assert f"(process {process.pid} on " in done.stdout and "has died; its lock is removed" in done.stdout
    assert "asking it to save and end" in done.stdout
    third = attempts(state)[2]
    assert third["from_step"] == 8 and third["outcome"] == "finished"
    assert outcome_of(workspace) == straight
    assert workspace.json(LONG_CHECKPOINT)["training"]["finetune"]["step"] == LONG["max_steps"]


def test_an_interrupt_saves_the_next_run_continues_and_an_end_is_for_good(workspace):
    hold(workspace, 4, attempts=2)
    target = long_manifest(workspace)
    process = workspace.start(target)
    state = wait_until_held(workspace, process)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C in a terminal does
    process.wait(timeout=PATIENCE_S)
    wait_for(lambda: not (state / "owner.json").exists(), PATIENCE_S, "the launcher's end")
    assert attempts(state)[-1]["outcome"] == "interrupted"
    saved = json.loads((state / "train_result.json").read_text())
    assert saved["status"] == "interrupted" and saved["step"] == 5

    name = f"finetune/{workspace.plan().run('finetune', 'long').name[:-4]}"  # its beginning is enough
    process = workspace.start(target)
    wait_until_held(workspace, process, attempt=2)
    assert "is asked to save and end" in end(workspace, name)
    assert process.wait(timeout=PATIENCE_S) != 0
    assert [row["outcome"] for row in attempts(state)] == ["interrupted"] * 2, "a third attempt was started"
    said = (workspace.folder / "snakemake.out").read_text()
    assert "before its job ended; attempt" not in said and "Trying to restart" not in said
    assert f"ended: ended by {getpass.getuser()} at 20" in said and "end --again finetune/" in said
    assert read_status(state).state == "ended"

    assert "not ended any more" in end(workspace, name, "--again")
    workspace.run(target)
    assert attempts(state)[2]["from_step"] == attempts(state)[1]["to_step"] == 10
    assert len(losses(state)) == LONG["max_steps"]


def end(workspace, *arguments):
    command = [sys.executable, "-m", "workflow_scripts.end", *arguments]
    options = {"cwd": workspace.folder, "env": workspace.environment() | {"PYTHONPATH": str(workspace.code)}}
    return subprocess.run(command, **options, text=True, check=True, stdout=subprocess.PIPE).stdout


def test_an_end_names_one_training(workspace):
    with pytest.raises(UserError, match="allowed: STAGE/RUN as `status` shows them"):
        find_run(workspace.folder, "vanilla")
    names = [path.name for path in (workspace.folder / "runs/finetune").iterdir()]
    assert find_run(workspace.folder, f"runs/finetune/{names[0]}/") == ("finetune", names[0])
    with pytest.raises(UserError, match="did you mean"):
        find_run(workspace.folder, "finetune/vanila-0123456789")


def test_what_will_repeat_is_not_retried_and_what_mends_it_clears_it(workspace):
    """A training that will fail again is started once, by this Snakemake and by the next; its reason is the
    last that they say. Without the record that fails it goes on.
    """
    workspace.config["experiments"] = {"strict": {"pretrain": {"learning_rate": 1e-3}}}
    workspace.config["compute"]["small"]["attempts"] = 3
    target = f"runs/pretrain/{workspace.run_folder('pretrain', 'strict').name}/manifest.json"
    number = spoil_a_picture(workspace, "pretrain", "random", step=4)
    for done in (workspace.run(target, check=False) for _ in range(2)):
        assert done.returncode != 0 and "Traceback" not in done.stdout
        assert "Trying to restart" not in done.stdout
        end, state = done.stdout[-2500:], workspace.state("pretrain", "strict")
        assert f"record {number} (id" in end and "not what the scan saw" in end
        assert f'mixtures.pretrain.skip_samples "#{number}"' in end
        assert str((state / "logs/attempt-001.log").relative_to(workspace.folder)) in end
    assert [row["outcome"] for row in attempts(state)] == ["verdict"]

    workspace.config["mixtures"]["pretrain"]["skip_samples"] = f"#{number}"
    done = workspace.run(target)
    assert re.findall(r"^(?:local)?rule (\w+):", done.stdout, re.MULTILINE) == ["pretrain"]
    rows = attempts(state)
    assert [row["outcome"] for row in rows] == ["verdict", "finished"]
    assert rows[-1]["from_step"] == 3 and len(losses(state)) == 6
    for path in (target, state.relative_to(workspace.folder) / "provenance.json"):
        ((after, (record,)),) = (entry.values() for entry in workspace.json(path)["skipped"])
        assert (after, record["record"], record["source"]) == (3, number, "captions")

    workspace.config["mixtures"]["pretrain"]["skip_samples"] = []
    shown = workspace.run("-n", target).stdout
    assert "Nothing to be done" in shown
    assert f"is finished and left out #{number}; mixtures.pretrain.skip_samples says nothing today" in shown


def test_attempts_without_progress_stop_with_the_log(workspace):
    """A training that dies without a reason is tried a few times and then refused, with the place of its
    log.
    """
    workspace.config["setup"] = f"export PYTHONPATH={workspace.folder}/dying"
    (workspace.folder / "dying").mkdir()
    (workspace.folder / "dying/sitecustomize.py").write_text(
        "import os, sys\nif 'llava_ext.train' in sys.orig_argv: os._exit(9)\n"
    )
    workspace.config["compute"]["small"].update(max_stuck_attempts=2, attempts=3)
    done = workspace.run(long_manifest(workspace), check=False)
    assert done.returncode != 0
    state = workspace.state("finetune", "long")
    assert len(attempts(state)) == 2
    assert re.search(
        r"the last 2 attempts .* saved nothing beyond step 0, so no further one is started", done.stdout
    )
    assert str((state / "logs/attempt-002.log").relative_to(workspace.folder)) in done.stdout
    assert "Traceback" not in done.stdout
