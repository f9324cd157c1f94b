"""`snakemake --profile slurm` on a real Slurm with two virtual nodes."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from tests.slurm.conftest import clone
from tests.slurm.sandbox import running
from tests.support.rerun_rows import RERUN_NOTHING, check_raised_version, check_row
from tests.support.workspace import kill_group, spoil_a_picture, wait_for
from tests.workflow.test_crash import attempts, losses
from workflow_scripts.launch import snakemakes
from workflow_scripts.launch.requeue import requeue_preempted
from workflow_scripts.status.read import all_statuses, read_status

TRAINED = "experiments/long/checkpoint.json"
# large enough that a training of 60 steps does not end while its first checkpoint is being noticed
SLOW = {"global_batch_size": 96}


def training(finished, folder, compute=(), **stage):
    """A copy of the finished folder with one more stage 2 to train."""
    workspace = finished.copy_to(folder / "w")
    workspace.config["compute"]["small"].update(dict(compute))
    workspace.config["experiments"]["long"] = {"finetune": {"max_steps": 60, "save_steps": 5, **stage}}
    return workspace


def checkpoint_of(workspace):
    state = workspace.state("finetune", "long")
    return state if state and list(state.glob("checkpoint-*/complete.json")) else None


def job_of(state):
    return json.loads((state / "owner.json").read_text())["job"]


def submitted(output, rule):
    """The Slurm jobs of a rule, in the order of their submission."""
    logs = re.findall(rf"SLURM jobid (\d+) \(log: \S*/rule_{rule}/", output)
    return list(dict.fromkeys(logs))


# ---------------------------------------------------------------- the whole path


def test_the_whole_path_goes_through_the_profile(finished_on_slurm, slurm):
    workspace = finished_on_slurm
    assert workspace.json("experiments/compress_4/checkpoint.json")["training"]["finetune"]["step"] == 8
    assert (workspace.folder / "report/index.html").is_file()
    # Light steps and everything that needs the network run on the login node, the rest in jobs with kept
    # logs.
    for rule, jobs in {
        "scan": 2,
        "mixture": 2,
        "survey": 2,
        "pretrain": 2,
        "finetune": 3,
        "export": 3,
        "predict": 3,
    }.items():
        assert len(submitted(workspace.output, rule)) == jobs, rule
        assert len(list(workspace.folder.glob(f"logs/slurm/rule_{rule}/**/*.log"))) == jobs, rule
    for rule in ("acquire", "prepare_model", "checkpoint", "score", "evaluation", "compare", "report"):
        assert not submitted(workspace.output, rule)
    for noise in ("sacct", "SLURM account", "never awaited"):
        assert noise not in workspace.output
    attempt = attempts(workspace.state("finetune", "vanilla"))[0]
    assert attempt["job"] in submitted(workspace.output, "finetune")


# One of each kind: a training, data, answers. All rows are planned on one machine by the same code.
@pytest.mark.parametrize("row", ["one flag", "a data file", "prompt of a task"])
def test_what_runs_again(finished_on_slurm, tmp_path, row):
    check_row(finished_on_slurm, tmp_path, row)


def test_what_runs_nothing_again_does_not_so_together(finished_on_slurm, tmp_path):
    check_row(finished_on_slurm, tmp_path, *RERUN_NOTHING)


def test_a_higher_code_version_makes_all_trainings_new(finished_on_slurm, tmp_path):
    check_raised_version(finished_on_slurm, tmp_path)


def test_the_local_profile_reruns_nothing_of_slurms_work(finished_on_slurm, tmp_path):
    workspace = finished_on_slurm.copy_to(tmp_path / "moved")
    workspace.options = []
    workspace.snakemake = ["-m", "snakemake"]
    assert workspace.planned() == []


def test_it_works_with_accounting_too(tmp_path):
    with running(accounting=True) as sandbox:
        workspace = clone(tmp_path / "clone", sandbox)
        shown = workspace.run("-n", "-q").stdout
        assert "Nothing to be done" not in shown and "never awaited" not in shown
        workspace.run("data")
        assert sandbox.output("sacct", "-X", "-n", "-o", "state").split() == ["COMPLETED"] * 4
    assert len(list(workspace.folder.glob("logs/slurm/rule_mixture/*/*.log"))) == 2


# ---------------------------------------------------------------- what a job asks for


def test_a_gpu_job_asks_for_exactly_what_the_config_says(finished_on_slurm, slurm, tmp_path):
    compute = {
        "gres": "gpu:2",
        "processes_per_node": 2,
        "parallel": "ddp",
        "per_device_batch_size": 4,
        "cpus": 2,
        "mem_mb": 3000,
    }
    workspace = training(finished_on_slurm, tmp_path, compute)
    process = workspace.start(TRAINED)
    state = wait_for(lambda: checkpoint_of(workspace), 120, "a checkpoint", process)
    shown = slurm.output("scontrol", "show", "job", "-o", job_of(state))
    for wanted in (
        "NumNodes=1",
        "TresPerNode=gres:gpu:2",
        "CPUs/Task=2",
        "MinMemoryNode=3000M",
        "TimeLimit=00:20:00",
        "Requeue=1",
    ):
        assert wanted in shown, shown
    # live, from the run folders alone
    live = next(item for item in all_statuses(workspace.folder) if item.folder == str(state))
    assert (live.state, live.where, live.processes, live.steps) == ("running", f"job {job_of(state)}", 2, 60)
    assert live.step >= live.saved_step >= 5 and live.eta_s is not None
    assert process.wait(timeout=240) == 0
    assert len(losses(state)) == 60


def test_a_job_on_two_nodes_gives_the_same_losses_as_one_process(finished_on_slurm, slurm, tmp_path):
    stage = {"max_steps": 10, "loss_normalization": "token"}
    one = training(finished_on_slurm, tmp_path / "one", **stage)
    done = one.run(TRAINED, "--slurm-exclude-failed-nodes", "n1")  # as the checks before a start advise
    shown = slurm.output("scontrol", "show", "job", "-o", submitted(done.stdout, "finetune")[0])
    assert "ExcNodeList=n1" in shown and " NodeList=n2" in shown
    compute = {"nodes": 2, "parallel": "ddp", "per_device_batch_size": 4, "gres": "gpu:1", "mem_mb": 3000}
    two = training(finished_on_slurm, tmp_path / "two", compute, **stage)
    done = two.run(TRAINED)
    shown = slurm.output("scontrol", "show", "job", "-o", submitted(done.stdout, "finetune")[0])
    assert "NumNodes=2" in shown and "n[1-2]" in shown
    state = two.state("finetune", "long")
    answers = sorted(path.name for path in (state / "preflight").glob("*.json"))
    assert answers == ["n1.json", "n2.json"]
    assert json.loads((state / "provenance.json").read_text())["processes"] == 2
    expected = losses(one.state("finetune", "long"))
    assert losses(state) == pytest.approx(expected, abs=1e-4)


def test_the_sites_setup_runs_inside_every_job(finished_on_slurm, tmp_path):
    workspace = finished_on_slurm.copy_to(tmp_path / "w")
    workspace.config["mixtures"]["finetune"]["parts"][0]["weight"] = 0.5
    (workspace.folder / "setup.sh").write_text('echo "setup of $SLURM_JOB_ID" >> setup.txt\n')
    with (workspace.folder / "slurm/config.yaml").open("a") as profile:
        profile.write("config: {setup: source setup.sh && ulimit -n 512}\n")
    done = workspace.run("data/mixtures/finetune/manifest.json")
    (job,) = submitted(done.stdout, "mixture")
    assert (workspace.folder / "setup.txt").read_text() == f"setup of {job}\n"


def test_a_node_that_lacks_something_is_named_before_the_model_loads(finished_on_slurm, tmp_path):
    """And not tried again by itself: the next attempt may come to the same nodes."""
    compute = {"nodes": 2, "gpus_per_node": 1, "parallel": "ddp", "per_device_batch_size": 4, "attempts": 3}
    workspace = training(finished_on_slurm, tmp_path, compute)
    done = workspace.run(TRAINED, check=False)
    assert done.returncode != 0 and len(submitted(done.stdout, "finetune")) == 1
    log = (
        workspace.folder / "logs/finetune" / f"{workspace.plan().run('finetune', 'long').name}.log"
    ).read_text()
    assert "n1: 0 GPUs are visible, 1 are needed" in log
    assert "n2: 0 GPUs are visible, 1 are needed" in log and "--slurm-exclude-failed-nodes n1,n2" in log
    # the error names the logs
    assert "logs/slurm/rule_finetune/" in done.stdout and "logs/finetune/" in done.stdout
    state = workspace.state("finetune", "long")
    assert not (state / "metrics.jsonl").exists()
    shown = read_status(state)
    assert shown.state == "refused" and "n1: 0 GPUs are visible" in shown.reason


# ---------------------------------------------------------------- interruptions


@pytest.fixture(scope="module")
def straight(finished_on_slurm, tmp_path_factory):
    """Losses and digest of the training that nothing interrupts."""
    workspace = training(finished_on_slurm, tmp_path_factory.mktemp("straight"), **SLOW)
    workspace.run(TRAINED)
    return losses(workspace.state("finetune", "long")), workspace.json(TRAINED)["digest"]


def test_a_cancelled_job_and_a_killed_snakemake_continue(finished_on_slurm, straight, slurm, tmp_path):
    workspace = training(finished_on_slurm, tmp_path, **SLOW)
    process = workspace.start(TRAINED)
    state = wait_for(lambda: checkpoint_of(workspace), 120, "a checkpoint", process)
    slurm.output("scancel", job_of(state))
    wait_for(lambda: len(attempts(state)) >= 2, 90, "the second attempt", process)
    second = attempts(state)[1]
    assert second["from_step"] >= 5
    wait_for(lambda: "continuing from" in (state / second["log"]).read_text(), 60, "its resumption", process)
    orphan = job_of(state)
    kill_group(process)
    assert slurm.output("squeue", "-h", "-j", orphan)

    done = workspace.run(TRAINED)
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
    assert (losses(state), workspace.json(TRAINED)["digest"]) == straight


def test_waiting_in_vain_is_said_at_once_and_an_end_is_for_good(finished_on_slurm, tmp_path):
    workspace = training(finished_on_slurm, tmp_path)
    run = workspace.plan().run("finetune", "long").name
    process = workspace.start(TRAINED, "--set-resources", "finetune:slurm_extra=--hold")
    out = workspace.folder / "snakemake.out"
    job = wait_for(lambda: submitted(out.read_text(), "finetune"), 120, "the submission", process)[0]
    vain = f"finetune {run} (Slurm job {job}) waits since 20"
    wait_for(lambda: vain in out.read_text(), 30, "what Snakemake says", process)
    assert f"JobHeldUser; waiting will not help: only `scontrol release {job}` starts it" in out.read_text()
    command = [sys.executable, "-m", "workflow_scripts.end", f"finetune/{run}"]
    options = {"cwd": workspace.folder, "env": workspace.environment()}
    done = subprocess.run(command, **options, text=True, check=True, stdout=subprocess.PIPE)
    assert f"Slurm job {job} is cancelled" in done.stdout
    assert process.wait(timeout=120) != 0
    assert submitted(out.read_text(), "finetune") == [job]
    assert out.read_text().count("waits since") == 1
    assert f"finetune {run}: ended by root at 20" in out.read_text()
    state = workspace.state("finetune", "long")
    assert state is None or not (state / "attempts.jsonl").exists(), "it was trained"


def test_what_slurm_would_refuse_ends_the_start_with_the_line_to_change(finished_on_slurm, tmp_path):
    workspace = finished_on_slurm.copy_to(tmp_path / "w")
    site = tmp_path / "site.yaml"
    site.write_text("default-resources:\n  slurm_partition: nope\n")
    workspace.extra_environment["LLAVA_SLURM_SITE"] = str(site)
    wanted = ["--forcerun", "acquire", "--set-resources", "scan:slurm_partition=short", "scan:runtime=45"]
    done = workspace.run("data", *wanted, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stdout
    assert "FAIL mixture: Slurm refuses the job" in done.stdout
    assert f"change one of: {site}, line 2: default-resources.slurm_partition (now nope)" in done.stdout
    assert (
        "FAIL scan: Slurm would never start the job (45 minutes; the partition short allows 30)"
        in done.stdout
    )
    assert "the command line (--set-resources scan:runtime) (now 45)" in done.stdout
    assert "nothing was fetched or submitted" in done.stdout and "localrule acquire" not in done.stdout
    assert "Nothing to be done" not in workspace.run("-n", "data", *wanted).stdout  # a dry run asks nobody


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(finished_on_slurm, straight, slurm, tmp_path):
    workspace = training(finished_on_slurm, tmp_path, **SLOW)
    process = workspace.start(TRAINED)
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
    assert (losses(state), workspace.json(TRAINED)["digest"]) == straight


def start_now(slurm, job, process):
    """Slurm waits about two minutes before a requeued job may start again; the tests do not."""
    wait_for(
        lambda: "PENDING" in slurm.output("squeue", "-h", "-j", job, "-o", "%T"), 60, "the requeue", process
    )
    slurm.output("scontrol", "update", f"JobId={job}", "StartTime=now")


@pytest.mark.parametrize("parallel", ["ddp", "zero2"])
def test_a_job_on_two_nodes_saves_when_told_to_end_and_when_cancelled(
    finished_on_slurm, slurm, tmp_path, parallel
):
    compute = {"nodes": 2, "parallel": parallel, "per_device_batch_size": 4, "gres": "gpu:1", "mem_mb": 3000}
    compute["dataloader_workers"] = 1  # which Slurm's signal reaches too
    # no checkpoint is ever due: what is saved is saved because of a signal
    workspace = training(finished_on_slurm, tmp_path, compute, max_steps=100, save_steps=1000)
    process = workspace.start(TRAINED)
    state = wait_for(lambda: workspace.state("finetune", "long"), 120, "the state folder", process)
    for attempt, signal in enumerate((["--signal=TERM"], []), start=1):  # ahead of the time limit; scancel
        wait_for(
            lambda n=attempt: steps_since_start(state, n) >= 2, 120, f"steps of attempt {attempt}", process
        )
        slurm.output("scancel", *signal, job_of(state))
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


def test_a_verdict_waits_in_the_queue_once(finished_on_slurm, tmp_path):
    """Neither the retries nor a second Snakemake submit a training that will fail again."""
    workspace = training(finished_on_slurm, tmp_path, {"gres": "gpu:1", "attempts": 3}, max_steps=3)
    number = spoil_a_picture(workspace, "finetune", "group_by_modality_length", step=1)
    first, second = (workspace.run(TRAINED, check=False) for _ in range(2))
    assert [len(submitted(done.stdout, "finetune")) for done in (first, second)] == [1, 0]
    assert [row["outcome"] for row in attempts(workspace.state("finetune", "long"))] == ["verdict"]
    for done in (first, second):
        assert done.returncode != 0
        assert f'mixtures.finetune.skip_samples "#{number}"' in done.stdout[-1500:]


def steps_since_start(state, attempt):
    """How many steps an attempt has logged."""
    rows = attempts(state) if (state / "attempts.jsonl").exists() else []
    if len(rows) < attempt or not (state / "metrics.jsonl").exists():
        return 0
    logged = (state / "metrics.jsonl").read_text().splitlines()
    return json.loads(logged[-1])["step"] - rows[-1]["from_step"] if logged else 0


# PreemptMode=REQUEUE and PreemptMode=CANCEL: there the main Snakemake does what Slurm does not
@pytest.mark.parametrize("partition", ["gpu", "cheap"])
def test_a_preempted_job_is_requeued_and_continues(finished_on_slurm, slurm, tmp_path, partition):
    workspace = training(finished_on_slurm, tmp_path, max_steps=120, **SLOW)
    process = workspace.start(TRAINED, "--set-resources", f"finetune:slurm_partition={partition}")
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
    assert len(losses(state)) == 120
    said = (workspace.folder / "snakemake.out").read_text()
    assert (f"Slurm job {job} was preempted and is in the queue again" in said) == (partition == "cheap")


def test_snakemake_itself_may_be_a_job(finished_on_slurm, slurm, tmp_path):
    workspace = training(finished_on_slurm, tmp_path, **SLOW)

    def submit():
        line = shlex.join(["env", "OMP_NUM_THREADS=1", *workspace.command(TRAINED)])
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
    assert attempts(state)[-1]["from_step"] >= 5 and len(losses(state)) == 60


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


def test_a_time_limit_saves_in_time_and_the_next_attempt_continues(finished_on_slurm, slurm, tmp_path):
    compute = {"runtime_min": 2, "save_before_end_s": 60, "attempts": 1, "dataloader_workers": 1}
    # longer than the limit on the fastest machine
    workspace = training(
        finished_on_slurm, tmp_path, compute, max_steps=1200, save_steps=1100, global_batch_size=40
    )
    told = workspace.run(TRAINED, check=False).stdout
    assert "its attempts (1, `attempts` in compute) are used up; the same command continues there" in told
    workspace.config["compute"]["small"]["runtime_min"] = 20  # the rest in one piece
    workspace.run(TRAINED)
    state = workspace.state("finetune", "long")
    rows = attempts(state)
    assert len(rows) >= 2, "the training was too short to meet its limit"
    # No checkpoint was due before the limit: what the next attempt starts from was saved because of the
    # signal.
    assert rows[0]["outcome"] == "interrupted"
    assert rows[1]["from_step"] == rows[0]["to_step"] > 0
    assert len(losses(state)) == 1200
    assert (workspace.folder / TRAINED).exists()
