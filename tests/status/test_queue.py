"""Trainings that wait in Slurm's queue: shown with the reason and since when, on a real private Slurm."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.slurm.sandbox import missing, running
from tests.support.workspace import ROOT
from workflow_scripts.status.queue import HOPELESS, SLOW, QueuedJob, training_of, with_queue
from workflow_scripts.status.read import Status

JOB = QueuedJob("7", "PENDING", "Resources", "2026-01-02T03:04:05", "/w", "rule_finetune_wildcards_demo-1a2b")


def test_a_job_is_a_trainings_by_the_comment_that_snakemake_gives_it():
    assert training_of(JOB) == ("finetune", "demo-1a2b")
    assert training_of(replace(JOB, comment="rule_scan_wildcards_coco")) is None
    assert training_of(replace(JOB, comment="(null)")) is None


def test_a_reason_that_time_will_not_mend_says_what_to_do():
    assert JOB.text == "waits since 2026-01-02 03:04:05: Resources"
    held = replace(JOB, reason="JobHeldUser")
    assert held.shown_state == "held" and "only `scontrol release 7` starts it" in held.text
    for reason in HOPELESS:
        said = replace(JOB, reason=reason).text
        assert f": {reason}; waiting will not help: " in said and "JOB" not in said.replace(reason, "")
    for begin in SLOW:
        said = replace(JOB, reason=f"{begin}, and more").text
        assert "; this may last: " in said and "will not help" not in said
    node = replace(JOB, reason="ReqNodeNotAvail, UnavailableNodes:n[1-2]").text
    assert "ReqNodeNotAvail, UnavailableNodes:n[1-2]; this may last: its nodes are down" in node
    assert not JOB.advice, "it only waits for its turn"
    assert replace(JOB, state="RUNNING", reason="None").shown_state == "starting"


def test_without_slurm_only_the_folders_speak(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    item = Status("finetune", "demo-1a2b", "interrupted")
    assert with_queue([item], tmp_path) == [item]


@pytest.mark.slurm
@pytest.mark.skipif(bool(missing(False)), reason="Slurm is not installed")
def test_what_waits_in_a_real_queue(tmp_path):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    with running() as sandbox:

        def submit(run, *options, folder=here):
            comment = f"--comment=rule_finetune_wildcards_{run}"
            base = ["sbatch", "--parsable", "--output=/dev/null", comment, "-D", str(folder)]
            return sandbox.output(*base, *options, "--wrap", "sleep 60")

        def status(*options):
            command = [sys.executable, "-m", "workflow_scripts.status", "--directory", str(here), *options]
            done = subprocess.run(command, cwd=ROOT, env=sandbox.environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout

        submit("begins", "-N2", "--exclusive")
        late, held = submit("late", "-p", "short", "-t", "60"), submit("held", "--hold")
        submit("next", "-N2", "--exclusive")
        submit("foreign", folder=elsewhere)
        sandbox._wait(lambda: "PartitionTimeLimit" in status("--json"), "the scheduler's verdict")
        found = {row["run"]: row for row in map(json.loads, status("--json").splitlines())}
        text = status()
    assert {run: row["state"] for run, row in found.items()} == {
        "begins": "starting",
        "late": "queued",
        "held": "held",
        "next": "queued",
    }
    assert found["late"]["where"] == f"job {late}"
    assert ": PartitionTimeLimit; waiting will not help: change runtime" in found["late"]["reason"]
    assert f"only `scontrol release {held}` starts it" in found["held"]["reason"]
    assert (
        found["next"]["reason"].startswith("waits since 20")
        and "will not help" not in found["next"]["reason"]
    )
    assert "PartitionTimeLimit" in text and text.rstrip().endswith("1 starting, 2 queued, 1 held")
