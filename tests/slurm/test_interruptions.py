"""Trainings in Slurm's jobs that end before they are done: cancelled, preempted, on a lost node, at a time
limit.
"""

import json
import os
import shlex
import signal

import pytest

from tests.slurm.conftest import job_of, training
from tests.support.finished import LONG, LONG_CHECKPOINT, attempts, checkpoint_of, losses
from tests.support.workspace import kill_group, wait_for
from workflow_scripts.launch import snakemakes
from workflow_scripts.launch.requeue import requeue_preempted


def test_a_cancelled_job_and_a_killed_snakemake_continue(ready, straight, slurm, tmp_path):
    workspace = training(ready, tmp_path, **LONG)
    process = workspace.start(LONG_CHECKPOINT)
    state = wait_for(lambda: checkpoint_of(workspace), 120, "a checkpoint", process)
    slurm.output("scancel", job_of(state))
    wait_for(lambda: len(attempts(state)) >= 2, 90, "the second attempt", process)
    second = attempts(state)[1]
    assert second["from_step"] >= 5
    wait_for(lambda: "continuing from" in (state / second["log"]).read_text(), 60, "its resumption", process)
    orphan = job_of(state)
    kill_group(process)
    assert slurm.output("squeue", "-h", "-j", orphan)

    done = workspace.run(LONG_CHECKPOINT)
    rows = attempts(state)
    if len(rows) > 2:
        assert rows[-1]["job"] != orphan
        assert (
            f"Slurm job {orphan} is still computing this training"
            in (
                workspace.folder / "logs/finetune" / f"{workspace.plan().run('finetune', 'long').name}.log"
            ).read_text()
        )
    assert rows[-1]["outcome"] == "finished", done.stdout[-2000:]
    assert (losses(state), workspace.json(LONG_CHECKPOINT)["digest"]) == straight


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(ready, straight, slurm, tmp_path):
    workspace = training(ready, tmp_path, **LONG)
    process = workspace.start(LONG_CHECKPOINT)
    state = wait_for(lambda: checkpoint_of(workspace), 120, "a checkpoint", process)
    job = job_of(state)
    lost = slurm.output("squeue", "-h", "-j", job, "-o", "%N")
    slurm.lose_node(lost)
    try:
        assert not (state / "train_result.json").exists()  # it could not save
        start_now(slurm, job, process)
        assert process.wait(timeout=300) == 0
        assert slurm.output("squeue", "-h", "--states=all", "-j", job, "-o", "%N") in {"n1", "n2"} - {lost}
    finally:
        slurm.return_node(lost)
    first, second = attempts(state)
    assert "outcome" not in first and second["outcome"] == "finished"
    assert first["job"] == second["job"] == job and second["from_step"] >= 5
    assert (losses(state), workspace.json(LONG_CHECKPOINT)["digest"]) == straight


def start_now(slurm, job, process):
    """Slurm waits about two minutes before a requeued job may start again; the tests do not."""
    wait_for(
        lambda: "PENDING" in slurm.output("squeue", "-h", "-j", job, "-o", "%T"), 60, "the requeue", process
    )
    slurm.output("scontrol", "update", f"JobId={job}", "StartTime=now")


@pytest.mark.parametrize("parallel", ["ddp", "zero2"])
def test_a_job_on_two_nodes_saves_when_told_to_end_and_when_cancelled(ready, slurm, tmp_path, parallel):
    compute = {"nodes": 2, "parallel": parallel, "per_device_batch_size": 4, "gres": "gpu:1", "mem_mb": 3000}
    compute["dataloader_workers"] = 1  # which Slurm's signal reaches too
    # no checkpoint is ever due: what is saved is saved because of a signal
    workspace = training(ready, tmp_path, compute, max_steps=100, save_steps=1000)
    process = workspace.start(LONG_CHECKPOINT)
    state = wait_for(lambda: workspace.state("finetune", "long"), 120, "the state folder", process)
    for attempt, how in enumerate((["--signal=TERM"], []), start=1):  # ahead of the time limit; scancel
        wait_for(
            lambda n=attempt: steps_since_start(state, n) >= 2, 120, f"steps of attempt {attempt}", process
        )
        slurm.output("scancel", *how, job_of(state))
        wait_for(lambda n=attempt: len(attempts(state)) > n, 120, "the next attempt", process)
    assert process.wait(timeout=300) == 0
    first, second, third = attempts(state)
    assert first["outcome"] == "interrupted" and third["outcome"] == "finished"
    # scancel leaves KillWait seconds for the save; on a slow machine that may be too few
    assert 0 < first["to_step"] == second["from_step"] <= third["from_step"] < 100
    assert len({row["job"] for row in (first, second, third)}) == 3
    assert len(losses(state)) == 100
    said = (workspace.folder / "snakemake.out").read_text()
    assert f"saved at step {first['to_step']} before its job ended; attempt 2 of 4 continues there" in said
    assert "Error in rule" not in said


def steps_since_start(state, attempt):
    """How many steps an attempt has logged."""
    rows = attempts(state) if (state / "attempts.jsonl").exists() else []
    if len(rows) < attempt or not (state / "metrics.jsonl").exists():
        return 0
    logged = (state / "metrics.jsonl").read_text().splitlines()
    return json.loads(logged[-1])["step"] - rows[-1]["from_step"] if logged else 0


# PreemptMode=REQUEUE and PreemptMode=CANCEL: there the main Snakemake does what Slurm does not
@pytest.mark.parametrize("partition", ["gpu", "cheap"])
def test_a_preempted_job_is_requeued_and_continues(ready, slurm, tmp_path, partition):
    workspace = training(ready, tmp_path, **LONG | {"max_steps": 80})
    process = workspace.start(LONG_CHECKPOINT, "--set-resources", f"finetune:slurm_partition={partition}")
    state = wait_for(lambda: checkpoint_of(workspace), 120, "a checkpoint", process)
    job = job_of(state)
    hog = slurm.output(
        "sbatch", "--parsable", "-p", "high", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3"
    )
    assert hog
    wait_for(
        lambda: "COMPLETED" in slurm.output("squeue", "-h", "--states=all", "-j", hog, "-o", "%T"),
        60,
        "the other job",
    )
    start_now(slurm, job, process)
    assert process.wait(timeout=300) == 0
    rows = attempts(state)
    assert [row["job"] for row in rows] == [job] * len(rows) and len(rows) >= 2
    assert rows[1]["from_step"] >= 5
    assert len(losses(state)) == 80
    said = (workspace.folder / "snakemake.out").read_text()
    assert (f"Slurm job {job} was preempted and is in the queue again" in said) == (partition == "cheap")


def test_snakemake_itself_may_be_a_job(ready, slurm, tmp_path):
    workspace = training(ready, tmp_path, **LONG)

    def submit():
        line = shlex.join(["env", "OMP_NUM_THREADS=1", *workspace.command(LONG_CHECKPOINT)])
        options = [
            "--no-requeue",
            "--mem=1000",
            "--signal=B:INT@300",
            f"--output={workspace.folder}/main.log",
        ]
        return slurm.output(
            "sbatch", "--parsable", *options, "-D", str(workspace.folder), "--wrap", f"exec {line}"
        )

    def ended(job):
        listed = slurm.output("squeue", "-h", "--states=all", "-j", job, "-o", "%T")
        return listed in ("COMPLETED", "FAILED") and listed

    main = submit()
    state = wait_for(lambda: checkpoint_of(workspace), 120, "a checkpoint")
    slurm.output("scancel", "--batch", "--signal=INT", main)  # what Slurm does ahead of the time limit
    wait_for(lambda: ended(main), 90, "the end of Snakemake")
    wait_for(lambda: not (state / "owner.json").exists(), 60, "the end of its job")
    again = submit()  # nothing has to be unlocked
    assert wait_for(lambda: ended(again), 240, "the second Snakemake") == "COMPLETED"
    assert attempts(state)[-1]["from_step"] >= 5 and len(losses(state)) == LONG["max_steps"]


def test_only_preempted_jobs_of_this_name_are_requeued_and_a_refusal_is_said_once(
    slurm, tmp_path, monkeypatch, capsys
):
    def submit(partition, *options):
        base = ("sbatch", "--parsable", "-w", "n1", "--output=/dev/null", "-p", partition)
        return slurm.output(*base, *options, "--wrap", "sleep 60")

    def states():
        listed = slurm.output(
            "squeue", "-h", "--states=all", f"--jobs={','.join(jobs)}", "--sort=i", "-o", "%T"
        )
        return listed.split()

    small = ("-c", "1", "--mem=100")
    jobs = [
        submit("cheap", *small, "--requeue", "--job-name=mine"),
        submit("cheap", *small, "--no-requeue", "--job-name=mine"),
        submit("cheap", *small, "--requeue", "--job-name=other"),
    ]
    wait_for(lambda: states() == ["RUNNING"] * 3, 30, "three jobs")
    hog = submit("high", "--exclusive")
    wait_for(lambda: states() == ["PREEMPTED"] * 3, 30, "their preemption")

    monkeypatch.setenv("PATH", slurm.environment["PATH"])
    refused = set()
    requeue_preempted("mine", refused)
    assert states() == ["PENDING", "PREEMPTED", "PREEMPTED"]
    assert refused == {jobs[1]}
    said = capsys.readouterr().err
    assert f"Slurm job {jobs[0]} was preempted and is in the queue again" in said
    assert f"Slurm job {jobs[1]} was preempted and Slurm does not take it back" in said

    requeue_preempted("mine", refused)
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm at all: nothing happens
    requeue_preempted("mine", set())
    assert not capsys.readouterr().err
    slurm.output("scancel", *jobs, hog)


def test_a_snakemake_elsewhere_lives_as_long_as_its_job(slurm, monkeypatch):
    monkeypatch.setenv("PATH", slurm.environment["PATH"])
    job = slurm.output("sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 60")
    elsewhere = {"boot": "another", "machine": "another", "host": "login2", "job": job}
    record = snakemakes.describe_myself() | elsewhere
    assert snakemakes.is_alive(record) is True
    slurm.output("scancel", job)
    wait_for(lambda: snakemakes.is_alive(record) is False, 30, "its end")


def test_a_time_limit_saves_in_time_and_the_next_attempt_continues(ready, slurm, tmp_path):
    compute = {"runtime_min": 2, "save_before_end_s": 60, "attempts": 1, "dataloader_workers": 1}
    # longer than the limit on the fastest machine; no checkpoint is due before it
    endless = {"max_steps": 9999, "save_steps": 9999, "global_batch_size": 40}
    workspace = training(ready, tmp_path, compute, **endless)
    told = workspace.run(LONG_CHECKPOINT, check=False).stdout
    assert "its attempts (1, `attempts` in compute) are used up; the same command continues there" in told
    process = workspace.start(LONG_CHECKPOINT)
    state = workspace.state("finetune", "long")
    wait_for(lambda: steps_since_start(state, 2) >= 1, 120, "a step of the next attempt", process)
    job = job_of(state)
    os.killpg(process.pid, signal.SIGINT)  # the rest shows nothing more
    process.wait(timeout=120)
    wait_for(lambda: not slurm.output("squeue", "-h", "-j", job), 60, "the end of its job")
    first, second = attempts(state)
    # what the next attempt starts from was saved because of the signal
    assert first["outcome"] == "interrupted" and second["from_step"] == first["to_step"] > 0
    assert len(losses(state)) > first["to_step"]
