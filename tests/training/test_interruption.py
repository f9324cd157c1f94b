"""A training that is killed, signalled or damaged, and started again, ends with the same bits."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from llava_ext.errors import TrainingError
from llava_ext.training import claim, states
from llava_ext.training.step_report import StepReports
from llava_ext.training.trainer import LlavaTrainer
from tests.support.disturb import After, Error, FullDisk, Killed, Signal, SignalToAll, Written
from tests.support.trainings import GOLDEN, command_line, losses, result, rows, run, start, wait_for

pytestmark = pytest.mark.slow
WEIGHTS = {1: "mm_projector.safetensors", 2: "model.safetensors"}


def assert_same(stage, ours, theirs):
    """Losses, rates and gradient norms of every step, and the final weights, to the last bit."""
    assert losses(ours) == losses(theirs)
    assert (ours / WEIGHTS[stage]).read_bytes() == (theirs / WEIGHTS[stage]).read_bytes()
    assert result(ours)["files"][WEIGHTS[stage]] == result(theirs)["files"][WEIGHTS[stage]]


def within(step, then):
    """``then`` is done in that step, between its two micro-batches."""
    return After(LlavaTrainer.compute_loss, then, calls=2 * step - 1)


@pytest.mark.parametrize(("stage", "step"), [(1, 6), (2, 13)])
def test_kill_9_at_a_step(stage, step, tmp_path, uninterrupted):
    """Step 6 lies behind the first checkpoint; step 13 in the second epoch."""
    argv = command_line(stage, tmp_path / "out")
    killed = within(step + 1, Signal(signal.SIGKILL))
    run(argv, tmp_path / "log", expect=-signal.SIGKILL, before=killed)
    assert rows(tmp_path / "out")[-1]["step"] == step
    assert not (tmp_path / "out" / "train_result.json").exists()
    text = run(argv, tmp_path / "log")
    assert "continuing from" in text
    assert_same(stage, tmp_path / "out", uninterrupted(stage))


@pytest.mark.parametrize(("stage", "number"), [(1, signal.SIGUSR1), (2, signal.SIGTERM)])
def test_signal_saves_at_the_end_of_the_step(stage, number, tmp_path, uninterrupted):
    argv = command_line(stage, tmp_path / "out", save_steps=1000)
    run(argv, tmp_path / "log", before=within(5, Signal(number)))
    stopped = result(tmp_path / "out")
    assert stopped["status"] == "interrupted" and stopped["step"] == 5
    assert (tmp_path / "out/checkpoint-5/complete.json").is_file()
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
    assert process.wait(900) == 0
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
    signalled = within(6, SignalToAll(number, tmp_path / "pids"))
    run(argv, tmp_path / "log", before=signalled, OPENBLAS_NUM_THREADS="2")
    assert (tmp_path / "pids").read_text()
    stopped = result(tmp_path / "out")
    assert stopped["status"] == "interrupted" and stopped["step"] == 6
    run(command_line(2, tmp_path / "out"), tmp_path / "log")  # without workers: they change no result
    assert_same(2, tmp_path / "out", uninterrupted(2))


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_dataset_workers_do_not_outlive_a_killed_trainer(tmp_path, context):
    workers = 2 if context == "fork" else 1  # each of the others loads all libraries
    argv = command_line(
        2, tmp_path / "out", dataloader_num_workers=workers, dataloader_multiprocessing_context=context
    )
    killed = within(3, Killed(tmp_path / "pids"))
    run(argv, tmp_path / "log", expect=-signal.SIGKILL, before=killed)
    left = [Path("/proc", pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(left) >= workers
    deadline = time.monotonic() + 900
    while any(path.exists() for path in left) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [path for path in left if path.exists()]


def test_an_error_ends_the_dataset_workers_too(tmp_path):
    """They do not heed signals from outside; without an end from the trainer it would wait for them for
    ever.
    """
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "max_steps": 4}
    argv = command_line(2, tmp_path / "out", **workers)
    for error in (RuntimeError("it broke"), TrainingError("it broke")):
        failing = After(StepReports.take_counts, Error(error))
        assert "it broke" in run(argv, tmp_path / "log", expect=1, before=failing)
    run(argv, tmp_path / "log")  # and those that are left at a good end
    assert result(tmp_path / "out")["status"] == "finished"


def test_what_helps_against_too_little_memory_may_change_on_the_way(tmp_path):
    """The global batch stays: smaller micro-batches and recomputed activations are the same steps."""
    token = {"loss_normalization": "token", "num_train_epochs": 1}
    run(command_line(2, tmp_path / "straight", **token), tmp_path / "log")
    argv = command_line(2, tmp_path / "out", **token)
    run(argv, tmp_path / "log", before=within(5, Signal(signal.SIGTERM)))
    assert result(tmp_path / "out")["status"] == "interrupted"
    smaller = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    text = run(
        command_line(2, tmp_path / "out", gradient_checkpointing=True, **smaller, **token), tmp_path / "log"
    )
    assert "micro_batch_size: 4 when it was started, now 2: the same steps, rounded otherwise" in text
    ours, theirs = ([row["loss"] for row in rows(tmp_path / name)] for name in ("out", "straight"))
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_signal_during_a_save_needs_no_second_one(tmp_path, uninterrupted):
    argv = command_line(2, tmp_path / "out")
    run(argv, tmp_path / "log", before=After(states.seal, Signal(signal.SIGTERM)))
    assert result(tmp_path / "out")["status"] == "interrupted" and result(tmp_path / "out")["step"] == 4
    run(argv, tmp_path / "log")
    assert_same(2, tmp_path / "out", uninterrupted(2))


def test_a_process_whose_training_was_taken_over_writes_nothing_more(tmp_path):
    """Its machine was cut off, Slurm gave the job to another one, and now it is back."""
    argv = command_line(2, tmp_path / "out", save_steps=4)
    taken = Written(tmp_path / "out" / claim.HOLDER, "process 7 on elsewhere")
    text = run(argv, tmp_path / "log", expect=1, before=After(states.seal, taken))
    assert "process 7 on elsewhere has taken this training over" in text
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
    # the first save succeeds
    text = run(argv, tmp_path / "log", expect=1, before=After(states.seal, FullDisk(100_000)))
    assert "checkpoint-8: could not be saved" in text and "checkpoint-4" in text
    assert "Traceback" not in text
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
