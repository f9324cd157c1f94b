"""A training that is killed, signalled or damaged, and started again, ends with the same bits."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_ext.training import claim, states
from tests.support.trainings import (
    GOLDEN,
    command_line,
    environment,
    losses,
    result,
    rows,
    run,
    start,
    wait_for,
)
from workflow_scripts.launch.processes import descendants, signal_tree

pytestmark = pytest.mark.slow
WEIGHTS = {1: "mm_projector.safetensors", 2: "model.safetensors"}


def assert_same(stage, ours, theirs):
    """Losses, rates and gradient norms of every step, and the final weights, to the last bit."""
    assert losses(ours) == losses(theirs)
    assert (ours / WEIGHTS[stage]).read_bytes() == (theirs / WEIGHTS[stage]).read_bytes()
    assert result(ours)["files"][WEIGHTS[stage]] == result(theirs)["files"][WEIGHTS[stage]]


def interrupt(argv, folder, step, number):
    """Sends ``number`` to a training that has done ``step`` steps; returns its exit status."""
    process = start(argv, folder / "log")
    wait_for(lambda: len(rows(folder / "out")) >= step, process)
    process.send_signal(number)
    return process.wait(60)


def run_with(function, then, argv, folder):
    """A training in which the first call of ``function`` is followed by the statements ``then``."""
    module = function.split(".")[0]
    script = folder / "script.py"
    script.write_text(
        "import os, resource, signal\n"
        f"from llava_ext import train\nfrom llava_ext.training import {module}\n"
        f"original = {function}\n"
        "def once(*args, **kwargs):\n"
        "    original(*args, **kwargs)\n"
        f"    {function} = original\n"
        f"    {then}\n"
        f"{function} = once\n"
        "train.main()\n"
    )
    command = [sys.executable, str(script), *argv]
    return subprocess.run(
        command, cwd=GOLDEN, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(("stage", "step"), [(1, 6), (2, 13)])
def test_kill_9_at_a_step(stage, step, tmp_path, uninterrupted):
    """Step 6 lies behind the first checkpoint; step 13 in the second epoch."""
    argv = command_line(stage, tmp_path / "out")
    assert interrupt(argv, tmp_path, step, signal.SIGKILL) == -signal.SIGKILL
    assert not (tmp_path / "out" / "train_result.json").exists()
    text = run(argv, tmp_path / "log")
    assert "continuing from" in text
    assert_same(stage, tmp_path / "out", uninterrupted(stage))


@pytest.mark.parametrize(("stage", "number"), [(1, signal.SIGUSR1), (2, signal.SIGTERM)])
def test_signal_saves_at_the_end_of_the_step(stage, number, tmp_path, uninterrupted):
    argv = command_line(stage, tmp_path / "out", save_steps=1000)
    assert interrupt(argv, tmp_path, 5, number) == 0
    stopped = result(tmp_path / "out")
    assert stopped["status"] == "interrupted" and 5 <= stopped["step"] < 20
    assert (tmp_path / "out" / f"checkpoint-{stopped['step']}" / "complete.json").is_file()
    run(argv, tmp_path / "log")
    assert_same(stage, tmp_path / "out", uninterrupted(stage))


def test_a_signal_is_heard_while_libraries_are_loading(tmp_path):
    """Slurm may send it at any moment, half a minute early too."""
    process = start(command_line(2, tmp_path / "out"), tmp_path / "log")
    proc = Path(f"/proc/{process.pid}")

    def catches_sigterm():
        line = next(line for line in (proc / "status").read_text().splitlines() if line.startswith("SigCgt"))
        return int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1

    wait_for(catches_sigterm, process)
    assert "libtorch" not in (proc / "maps").read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert result(tmp_path / "out")["status"] == "interrupted" and result(tmp_path / "out")["step"] == 1


@pytest.mark.parametrize(
    ("context", "number"),
    [
        ("fork", signal.SIGUSR1),
        ("spawn", signal.SIGTERM),
        ("forkserver", signal.SIGTERM),
    ],
)
def test_a_signal_to_every_process_of_a_job_leaves_the_dataset_workers_at_work(
    tmp_path, uninterrupted, context, number
):
    """Slurm sends it to all; a worker that died of it would take the training with it, ahead of the save."""
    argv = command_line(
        2, tmp_path / "out", dataloader_num_workers=1, dataloader_multiprocessing_context=context
    )
    # with threads of libraries that the workers load before any code of ours
    process = start(argv, tmp_path / "log", OPENBLAS_NUM_THREADS="2")
    wait_for(lambda: len(rows(tmp_path / "out")) >= 6, process)
    assert descendants(process.pid)
    signal_tree(process.pid, number)
    assert process.wait(60) == 0, (tmp_path / "log").read_text()[-2000:]
    stopped = result(tmp_path / "out")
    assert stopped["status"] == "interrupted" and 6 <= stopped["step"] < 20
    run(command_line(2, tmp_path / "out"), tmp_path / "log")  # without workers: they change no result
    assert_same(2, tmp_path / "out", uninterrupted(2))


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_dataset_workers_do_not_outlive_a_killed_trainer(tmp_path, context):
    workers = 2 if context == "fork" else 1  # each of the others loads all libraries
    argv = command_line(
        2, tmp_path / "out", dataloader_num_workers=workers, dataloader_multiprocessing_context=context
    )
    process = start(argv, tmp_path / "log")
    wait_for(lambda: len(rows(tmp_path / "out")) >= 3, process)
    left = [Path(f"/proc/{pid}") for pid in descendants(process.pid)]
    assert len(left) >= workers
    process.kill()
    process.wait(60)
    deadline = time.monotonic() + 60
    while any(path.exists() for path in left) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [path for path in left if path.exists()]


@pytest.mark.parametrize("error", ["RuntimeError", "errors.TrainingError"])
def test_an_error_ends_the_dataset_workers_too(tmp_path, error):
    """They do not heed signals from outside; without an end from the trainer it would wait for them for
    ever.
    """
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "max_steps": 4}
    argv = command_line(2, tmp_path / "out", **workers)
    then = f"from llava_ext import errors; raise {error}('it broke')"
    done = run_with("step_report.StepReports.take_counts", then, argv, tmp_path)
    assert done.returncode == 1 and "it broke" in done.stderr
    run(argv, tmp_path / "log")  # and those that are left at a good end
    assert result(tmp_path / "out")["status"] == "finished"


def test_what_helps_against_too_little_memory_may_change_on_the_way(tmp_path):
    """The global batch stays: smaller micro-batches and recomputed activations are the same steps."""
    token = {"loss_normalization": "token", "num_train_epochs": 1}
    run(command_line(2, tmp_path / "straight", **token), tmp_path / "log")
    assert (
        interrupt(command_line(2, tmp_path / "out", **token), tmp_path, 5, signal.SIGTERM) == 0
        and result(tmp_path / "out")["status"] == "interrupted"
    )
    smaller = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    text = run(
        command_line(2, tmp_path / "out", gradient_checkpointing=True, **smaller, **token), tmp_path / "log"
    )
    assert "micro_batch_size: 4 when it was started, now 2: the same steps, rounded otherwise" in text
    ours, theirs = ([row["loss"] for row in rows(tmp_path / name)] for name in ("out", "straight"))
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_signal_during_a_save_needs_no_second_one(tmp_path, uninterrupted):
    argv = command_line(2, tmp_path / "out")
    done = run_with("states.seal", "os.kill(os.getpid(), signal.SIGTERM)", argv, tmp_path)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "out")["status"] == "interrupted" and result(tmp_path / "out")["step"] == 4
    run(argv, tmp_path / "log")
    assert_same(2, tmp_path / "out", uninterrupted(2))


def test_a_process_whose_training_was_taken_over_writes_nothing_more(tmp_path):
    """Its machine was cut off, Slurm gave the job to another one, and now it is back."""
    argv = command_line(2, tmp_path / "out", save_steps=4)
    lock = (tmp_path / "out" / claim.HOLDER).as_posix()
    done = run_with("states.seal", f"open({lock!r}, 'w').write('process 7 on elsewhere')", argv, tmp_path)
    assert done.returncode == 1
    assert "process 7 on elsewhere has taken this training over" in done.stderr
    assert rows(tmp_path / "out")[-1]["step"] == 4
    assert [item.step for item in states.checkpoints(tmp_path / "out")] == [4]


def test_damaged_newest_checkpoint(tmp_path, uninterrupted):
    """A byte that changed on the disk: the checkpoint before is used, and the end is the same."""
    shutil.copytree(uninterrupted(2), tmp_path / "out")
    argv = command_line(2, tmp_path / "out")
    for name in ("train_result.json", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    path = tmp_path / "out" / "checkpoint-20" / "optimizer.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    text = run(argv, tmp_path / "log")
    assert "checkpoint-20: not usable: optimizer.pt has changed" in text
    assert "continuing from" in text and "checkpoint-16" in text
    assert_same(2, tmp_path / "out", uninterrupted(2))


def test_lost_final_weights_are_made_again(tmp_path, uninterrupted):
    shutil.copytree(uninterrupted(1), tmp_path / "out")
    (tmp_path / "out" / "mm_projector.safetensors").unlink()
    run(command_line(1, tmp_path / "out"), tmp_path / "log")
    assert_same(1, tmp_path / "out", uninterrupted(1))


def test_finished_training_says_so(tmp_path, uninterrupted):
    folder = uninterrupted(1)
    before = (folder / "train_result.json").stat().st_mtime_ns
    text = run(command_line(1, folder), tmp_path / "log")
    assert "this training is finished (step 20); nothing to do" in text
    assert (folder / "train_result.json").stat().st_mtime_ns == before


def test_another_configuration_is_refused(tmp_path, uninterrupted):
    text = run(command_line(1, uninterrupted(1), learning_rate=2e-3), tmp_path / "log", expect=1)
    assert "learning_rate: 0.001 when it was started, now 0.002" in text
    assert "Traceback" not in text


def test_only_the_newest_checkpoints_are_kept(uninterrupted):
    for stage in (1, 2):
        kept = sorted(path.name for path in uninterrupted(stage).glob("checkpoint-*"))
        assert kept == ["checkpoint-16", "checkpoint-20"]
        assert not list(uninterrupted(stage).glob(".saving*"))


def test_stage_1_checkpoints_hold_the_projector_only(uninterrupted):
    size = sum(path.stat().st_size for path in (uninterrupted(1) / "checkpoint-20").iterdir())
    assert size < 200_000


def test_a_full_disk_during_a_save_loses_nothing(tmp_path, uninterrupted):
    """A quota that the second checkpoint does not fit into; then the same command goes on."""
    argv = command_line(2, tmp_path / "out")
    # The first save succeeds; then files may not grow beyond a few kB, as on a full disk.
    full = (
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,"
        " 100_000))"
    )
    done = run_with("states.seal", full, argv, tmp_path)
    assert done.returncode == 1
    assert "checkpoint-8: could not be saved" in done.stderr and "checkpoint-4" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob(".saving*"))
    run(argv, tmp_path / "log")
    assert_same(2, tmp_path / "out", uninterrupted(2))


def test_what_was_seen_is_not_read_again(tmp_path):
    """Going on at step N must not cost the reading of N steps: their images may even be gone."""
    records = json.loads((GOLDEN / "train" / "stage2.json").read_text())
    records = [record for record in records if "image" in record][:32]
    for number, record in enumerate(records):
        (tmp_path / "images").mkdir(exist_ok=True)
        shutil.copy(GOLDEN / "images" / record["image"], tmp_path / "images" / f"{number}.png")
        record["image"] = f"{number}.png"
    (tmp_path / "samples.json").write_text(json.dumps(records))
    flags = {"group_by_modality_length": None, "sampling": "sequential", "max_steps": 4, "save_steps": 3}
    flags |= {"data_path": tmp_path / "samples.json", "image_folder": tmp_path / "images"}
    run(command_line(2, tmp_path / "out", **flags), tmp_path / "log")
    expected = losses(tmp_path / "out")
    for name in ("train_result.json", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    for number in range(3 * 8):
        (tmp_path / "images" / f"{number}.png").unlink()
    assert "continuing from" in run(command_line(2, tmp_path / "out", **flags), tmp_path / "log")
    assert losses(tmp_path / "out") == expected
