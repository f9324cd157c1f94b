"""Trainings in Slurm's jobs that end before they are done: cancelled, preempted, on a lost node, at a time
limit.
"""

import shlex

import pytest

from tests.slurm.conftest import job_of, training
from tests.support.finished import LONG, attempts, long_manifest, losses, outcome_of
from tests.support.held import PATIENCE_S, hold, wait_until_held
from tests.support.workspace import kill_group, wait_for
from workflow_scripts.launch import snakemakes
from workflow_scripts.launch.requeue import requeue_preempted


def test_a_cancelled_job_and_a_killed_snakemake_continue(ready, straight, slurm, tmp_path):
    workspace = training(ready, tmp_path)
    hold(workspace, 4, attempts=2)
    target = long_manifest(workspace)
    process = workspace.start(target)
    state = wait_until_held(workspace, process)
    slurm.output("scancel", job_of(state))
    wait_until_held(workspace, process, attempt=2)
    assert attempts(state)[1]["from_step"] >= 3
    orphan = job_of(state)
    kill_group(process)
    assert slurm.output("squeue", "-h", "-j", orphan)

    done = workspace.run(target)
    log = workspace.folder / "logs/finetune" / f"{workspace.plan().run('finetune', 'long').name}.log"
    assert f"Slurm job {orphan} is still computing this training" in log.read_text()
    third = attempts(state)[2]
    assert third["job"] != orphan and third["outcome"] == "finished", done.stdout[-2000:]
    assert outcome_of(workspace) == straight


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(ready, straight, slurm, tmp_path):
    workspace = training(ready, tmp_path)
    hold(workspace, 4)
    process = workspace.start(long_manifest(workspace))
    state = wait_until_held(workspace, process)
    job = job_of(state)
    lost = slurm.output("squeue", "-h", "-j", job, "-o", "%N")
    slurm.lose_node(lost)
    try:
        assert not (state / "train_result.json").exists()  # it could not save
        start_now(slurm, job, process)
        assert process.wait(timeout=PATIENCE_S) == 0
        assert slurm.output("squeue", "-h", "--states=all", "-j", job, "-o", "%N") in {"n1", "n2"} - {lost}
    finally:
        slurm.return_node(lost)
    first, second = attempts(state)
    assert "outcome" not in first and second["outcome"] == "finished"
    assert first["job"] == second["job"] == job and second["from_step"] == 3
    assert outcome_of(workspace) == straight


def start_now(slurm, job, process):
    """Slurm waits about two minutes before a requeued job may start again; the tests do not."""
    wait_for(
        lambda: "PENDING" in slurm.output("squeue", "-h", "-j", job, "-o", "%T"),
        PATIENCE_S,
        "the requeue",
        process,
    )
    slurm.output("scontrol", "update", f"JobId={job}", "StartTime=now")


def test_a_job_on_two_nodes_saves_when_told_to_end_and_when_cancelled(ready, straight, slurm, tmp_path):
    compute = {"nodes": 2, "parallel": "zero2", "per_device_batch_size": 4, "gres": "gpu:1", "mem_mb": 3000}
    compute["dataloader_workers"] = 1  # which Slurm's signal reaches too
    # no checkpoint is ever due: what is saved is saved because of a signal
    workspace = training(ready, tmp_path, compute, save_steps=1000)
    hold(workspace, 2, attempts=2)
    process = workspace.start(long_manifest(workspace))
    for attempt, how in enumerate((["--signal=TERM"], []), start=1):  # ahead of the time limit; scancel
        state = wait_until_held(workspace, process, attempt)
        slurm.output("scancel", *how, job_of(state))
    assert process.wait(timeout=PATIENCE_S) == 0
    first, second, third = attempts(state)
    assert first["outcome"] == "interrupted" and third["outcome"] == "finished"
    assert first["to_step"] == second["from_step"] == 3
    # scancel leaves KillWait seconds for the save; on a slow machine that may be too few
    assert third["from_step"] in (3, 6)
    assert len({row["job"] for row in (first, second, third)}) == 3
    assert losses(state) == pytest.approx(straight[0], abs=1e-3)
    said = (workspace.folder / "snakemake.out").read_text()
    assert "saved at step 3 before its job ended; attempt 2 of 4 continues there" in said
    assert "Error in rule" not in said


# PreemptMode=REQUEUE and PreemptMode=CANCEL: there the main Snakemake does what Slurm does not
@pytest.mark.parametrize("partition", ["gpu", "cheap"])
def test_a_preempted_job_is_requeued_and_continues(ready, slurm, tmp_path, partition):
    workspace = training(ready, tmp_path)
    hold(workspace, 4)
    partition_of_it = ("--set-resources", f"finetune:slurm_partition={partition}")
    process = workspace.start(long_manifest(workspace), *partition_of_it)
    state = wait_until_held(workspace, process)
    job = job_of(state)
    hog = slurm.output(
        "sbatch", "--parsable", "-p", "high", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3"
    )
    assert hog
    wait_for(
        lambda: "COMPLETED" in slurm.output("squeue", "-h", "--states=all", "-j", hog, "-o", "%T"),
        PATIENCE_S,
        "the other job",
    )
    start_now(slurm, job, process)
    assert process.wait(timeout=PATIENCE_S) == 0
    first, second = attempts(state)
    assert first["job"] == second["job"] == job
    assert 3 <= second["from_step"] <= 5
    assert len(losses(state)) == LONG["max_steps"]
    said = (workspace.folder / "snakemake.out").read_text()
    assert (f"Slurm job {job} was preempted and is in the queue again" in said) == (partition == "cheap")


def test_snakemake_itself_may_be_a_job(ready, slurm, tmp_path):
    workspace = training(ready, tmp_path)
    hold(workspace, 4)

    def submit():
        line = shlex.join(["env", "OMP_NUM_THREADS=1", *workspace.command(long_manifest(workspace))])
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
    state = wait_until_held(workspace)
    slurm.output("scancel", "--batch", "--signal=INT", main)  # what Slurm does ahead of the time limit
    wait_for(lambda: ended(main), PATIENCE_S, "the end of Snakemake")
    # Snakemake cancels what it started, but for a job whose state it is just asking for: the next attempt has
    # that one save and end. Nothing has to be unlocked.
    again = submit()
    assert wait_for(lambda: ended(again), PATIENCE_S, "the second Snakemake") == "COMPLETED"
    _, second = attempts(state)
    assert 3 <= second["from_step"] <= 5 and second["outcome"] == "finished"
    assert len(losses(state)) == LONG["max_steps"]


def test_only_preempted_jobs_of_this_name_are_requeued_and_a_refusal_is_said_once(
    slurm, tmp_path, monkeypatch, capsys
):
    def submit(partition, *options):
        base = ("sbatch", "--parsable", "-w", "n1", "--output=/dev/null", "-p", partition)
        return slurm.output(*base, *options, "--wrap", "sleep 1800")

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
    wait_for(lambda: states() == ["RUNNING"] * 3, PATIENCE_S, "three jobs")
    hog = submit("high", "--exclusive")
    wait_for(lambda: states() == ["PREEMPTED"] * 3, PATIENCE_S, "their preemption")

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
    job = slurm.output("sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 1800")
    elsewhere = {"boot": "another", "machine": "another", "host": "login2", "job": job}
    record = snakemakes.describe_myself() | elsewhere
    assert snakemakes.is_alive(record) is True
    slurm.output("scancel", job)
    wait_for(lambda: snakemakes.is_alive(record) is False, PATIENCE_S, "its end")


def test_a_time_limit_saves_in_time_and_the_next_attempt_continues(ready, straight, tmp_path):
    # told to after a minute; the rest is what a busy machine may take
    compute = {"runtime_min": 10, "save_before_end_s": 540, "attempts": 1, "dataloader_workers": 1}
    # no checkpoint is due: what the next attempt starts from was saved because of the signal
    workspace = training(ready, tmp_path, compute, save_steps=1000)
    hold(workspace, 2)
    target = long_manifest(workspace)
    told = workspace.run(target, check=False).stdout
    assert "its attempts (1, `attempts` in compute) are used up; the same command continues there" in told
    workspace.config["compute"]["small"].update(runtime_min=60, save_before_end_s=120)
    workspace.run(target)
    first, second = attempts(workspace.state("finetune", "long"))
    assert first["outcome"] == "interrupted" and second["outcome"] == "finished"
    assert 0 < first["to_step"] == second["from_step"] <= 3
    assert outcome_of(workspace) == straight
