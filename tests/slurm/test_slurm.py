"""`snakemake --profile slurm` on a real Slurm with two virtual nodes."""

import json
import subprocess
import sys

import pytest

from tests.slurm.conftest import clone, job_of, submitted, training
from tests.slurm.sandbox import running
from tests.support.finished import LONG, LONG_CHECKPOINT, attempts, long_manifest, losses, manifests
from tests.support.held import PATIENCE_S, hold, let_go, wait_until_held
from tests.support.rerun_rows import RERUN_NOTHING, check_raised_version, check_row
from tests.support.workspace import spoil_a_picture, wait_for
from workflow_scripts.status.read import all_statuses, read_status

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
        "finetune": 2,
        "export": 2,
        "predict": 2,
    }.items():
        assert len(submitted(workspace.output, rule)) == jobs, rule
        assert len(list(workspace.folder.glob(f"logs/slurm/rule_{rule}/**/*.log"))) == jobs, rule
    for rule in ("acquire", "prepare_model", "checkpoint", "score", "evaluation", "compare", "report"):
        assert not submitted(workspace.output, rule)
    for noise in ("sacct", "SLURM account", "never awaited"):
        assert noise not in workspace.output
    attempt = attempts(workspace.state("finetune", "vanilla"))[0]
    assert attempt["job"] in submitted(workspace.output, "finetune")


# docs/architecture.md lists it: where a `path` source's files lie is what its manifest is about.
MAY_DIFFER = {"data/sources/questions/manifest.json"}


def test_another_folder_another_executor_and_another_clock_give_the_same_manifests(
    finished, finished_on_slurm
):
    first, second = manifests(finished), manifests(finished_on_slurm)
    assert {name.split("/")[0] for name in second} == {"data", "models", "runs", "experiments"}
    for name, content in second.items():
        if name in MAY_DIFFER:
            assert first[name] != content and first[name]["digest"] == content["digest"]
        else:
            assert first[name] == content, name
    states = [
        {path.name for path in it.folder.glob("runs/finetune/*/*/")} for it in (finished, finished_on_slurm)
    ]
    assert states[1] <= states[0]


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
        workspace.run("data/mixtures/pretrain/manifest.json")  # one job, and one behind it
        assert sandbox.output("sacct", "-X", "-n", "-o", "state").split() == ["COMPLETED"] * 2
    assert len(list(workspace.folder.glob("logs/slurm/rule_mixture/*/*.log"))) == 1


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
    hold(workspace, 4)
    process = workspace.start(long_manifest(workspace))
    state = wait_until_held(workspace, process)
    job, steps = job_of(state), LONG["max_steps"]
    shown = slurm.output("scontrol", "show", "job", "-o", job)
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
    assert (live.state, live.where, live.processes, live.steps) == ("running", f"job {job}", 2, steps)
    assert (live.step, live.saved_step) == (4, 3) and live.eta_s is not None
    let_go(workspace)
    assert process.wait(timeout=PATIENCE_S) == 0
    assert len(losses(state)) == steps


def test_a_job_on_two_nodes_gives_the_same_losses_as_one_process(
    finished_on_slurm, straight, slurm, tmp_path
):
    """Also when it is told to end, ahead of a time limit say, and goes on in another job."""
    compute = {"nodes": 2, "parallel": "ddp", "per_device_batch_size": 4, "gres": "gpu:1", "mem_mb": 3000}
    # no checkpoint is ever due: what is saved is saved because of the signal
    workspace = training(finished_on_slurm, tmp_path, compute, save_steps=1000)
    hold(workspace, 2)
    process = workspace.start(long_manifest(workspace))
    state = wait_until_held(workspace, process)
    job = job_of(state)
    shown = slurm.output("scontrol", "show", "job", "-o", job)
    assert "NumNodes=2" in shown and "n[1-2]" in shown
    slurm.output("scancel", "--signal=TERM", job)
    assert process.wait(timeout=PATIENCE_S) == 0
    first, second = attempts(state)
    assert first["outcome"] == "interrupted" and first["to_step"] == second["from_step"] == 3
    answers = sorted(path.name for path in (state / "preflight").glob("*.json"))
    assert answers == ["n1.json", "n2.json"]
    assert json.loads((state / "provenance.json").read_text())["processes"] == 2
    assert losses(state) == pytest.approx(straight[0], abs=1e-4)


def test_the_sites_setup_runs_inside_every_job(finished_on_slurm, slurm, tmp_path):
    workspace = finished_on_slurm.copy_to(tmp_path / "w")
    workspace.config["mixtures"]["finetune"]["parts"][0]["weight"] = 0.5
    (workspace.folder / "setup.sh").write_text('echo "setup of $SLURM_JOB_ID" >> setup.txt\n')
    with (workspace.folder / "slurm/config.yaml").open("a") as profile:
        profile.write("config: {setup: source setup.sh && ulimit -n 512}\n")
    # as the checks before a start advise
    without = ("--slurm-exclude-failed-nodes", "n1")
    done = workspace.run("data/mixtures/finetune/manifest.json", *without)
    (job,) = submitted(done.stdout, "mixture")
    shown = slurm.output("scontrol", "show", "job", "-o", job)
    assert "ExcNodeList=n1" in shown and " NodeList=n2" in shown
    assert (workspace.folder / "setup.txt").read_text() == f"setup of {job}\n"


def test_a_node_that_lacks_something_is_named_before_the_model_loads(finished_on_slurm, tmp_path):
    """And not tried again by itself: the next attempt may come to the same nodes."""
    compute = {"nodes": 2, "gpus_per_node": 1, "parallel": "ddp", "per_device_batch_size": 4, "attempts": 3}
    workspace = training(finished_on_slurm, tmp_path, compute)
    done = workspace.run(LONG_CHECKPOINT, check=False)
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


# ---------------------------------------------------------------- what is said


def test_waiting_in_vain_is_said_at_once_and_an_end_is_for_good(finished_on_slurm, tmp_path):
    workspace = training(finished_on_slurm, tmp_path)
    run = workspace.plan().run("finetune", "long").name
    process = workspace.start(LONG_CHECKPOINT, "--set-resources", "finetune:slurm_extra=--hold")
    out = workspace.folder / "snakemake.out"
    job = wait_for(lambda: submitted(out.read_text(), "finetune"), PATIENCE_S, "the submission", process)[0]
    vain = f"finetune {run} (Slurm job {job}) waits since 20"
    wait_for(lambda: vain in out.read_text(), PATIENCE_S, "what Snakemake says", process)
    assert f"JobHeldUser; waiting will not help: only `scontrol release {job}` starts it" in out.read_text()
    command = [sys.executable, "-m", "workflow_scripts.end", f"finetune/{run}"]
    options = {"cwd": workspace.folder, "env": workspace.environment()}
    done = subprocess.run(command, **options, text=True, check=True, stdout=subprocess.PIPE)
    assert f"Slurm job {job} is cancelled" in done.stdout
    assert process.wait(timeout=PATIENCE_S) != 0
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


def test_a_verdict_waits_in_the_queue_once(finished_on_slurm, tmp_path):
    """Neither the retries nor a second Snakemake submit a training that will fail again."""
    compute, stage = {"gres": "gpu:1", "attempts": 3}, {"max_steps": 3, "global_batch_size": 8}
    workspace = training(finished_on_slurm, tmp_path, compute, **stage)
    number = spoil_a_picture(workspace, "finetune", "group_by_modality_length", step=1)
    first, second = (workspace.run(LONG_CHECKPOINT, check=False) for _ in range(2))
    assert [len(submitted(done.stdout, "finetune")) for done in (first, second)] == [1, 0]
    assert [row["outcome"] for row in attempts(workspace.state("finetune", "long"))] == ["verdict"]
    for done in (first, second):
        assert done.returncode != 0
        assert f'mixtures.finetune.skip_samples "#{number}"' in done.stdout[-1500:]
