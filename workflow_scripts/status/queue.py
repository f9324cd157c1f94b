"""What Slurm says of the trainings that wait in its queue: since when, why, and whether waiting helps."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workflow_scripts.launch import requeue
from workflow_scripts.stages import STAGES
from workflow_scripts.status.read import Status

# Job, state, reason, time of submission, working folder, comment: the comment may hold anything, so it is
# last.
FORMAT = "%A|%T|%r|%V|%Z|%k"
CONFIG = "the section compute of the configuration"
PROFILE = "slurm/config.yaml"
PARTITION = f"change runtime or nodes in {CONFIG}, or slurm_partition in {PROFILE}"
LIMIT = (
    f"a limit of your account or QOS; ask for less in {CONFIG}, or change qos or slurm_account in {PROFILE}"
)
RELEASE = "only `scontrol release JOB` starts it"
# Slurm's reasons that stay as they are however long a job waits, and what to do.
HOPELESS = {
    "PartitionTimeLimit": PARTITION,
    "PartitionNodeLimit": PARTITION,
    "BadConstraints": f"no node is as asked for; change constraint in {PROFILE}, or {CONFIG}",
    "AccountNotAllowed": f"change slurm_account or slurm_partition in {PROFILE}",
    "QOSNotAllowed": f"change qos or slurm_partition in {PROFILE}",
    "InvalidAccount": f"change slurm_account in {PROFILE}",
    "InvalidQOS": f"change qos in {PROFILE}",
    "DependencyNeverSatisfied": "the job that it waits for has failed; `scancel JOB`",
    "JobHeldUser": RELEASE,
    "JobHeldAdmin": f"{RELEASE}, and only an administrator may",
    "launch failed requeued held": RELEASE,
    **{
        f"{owner}Max{what}Limit": LIMIT
        for owner in ("Assoc", "QOS")
        for what in ("WallDurationPerJob", "CpuPerJob", "NodePerJob", "MemPerJob", "GRESPerJob")
    },
    **{f"QOSMax{what}": LIMIT for what in ("NodePerJobLimit", "MemoryPerJob", "GRESPerJob")},
}
# Reasons that begin like this last until somebody else does something.
DOWN = "its nodes are down, drained or reserved: `sinfo -R` says why"
SHARED = (
    "a limit on all jobs of an account or QOS together: it starts when others have ended, if it fits at all"
)
SLOW = {
    "ReqNodeNotAvail": f"{DOWN}; where it asks for them by name, change constraint or slurm_partition",
    "Nodes required for job are DOWN": DOWN,
    "PartitionDown": "the partition takes jobs and starts none: `sinfo -p` shows it",
    "PartitionInactive": "the partition takes jobs and starts none: `sinfo -p` shows it",
    "Reservation": f"its reservation has not begun, or is over; change it in {PROFILE}",
    **dict.fromkeys(("AssocGrp", "AssocMax", "QOSGrp", "QOSMax"), SHARED),
}
HELD = ("JobHeldUser", "JobHeldAdmin", "launch failed requeued held")


@dataclass(frozen=True)
class QueuedJob:
    """A line of `squeue`; ``since``: when it was submitted, the cluster's local time."""

    job: str
    state: str
    reason: str
    since: str
    folder: str
    comment: str

    @property
    def shown_state(self) -> str:
        """`held`, `queued`, or `starting`: the job runs, its training has not begun."""
        if self.state != "PENDING":
            return "starting"
        return "held" if self.reason in HELD else "queued"

    @property
    def text(self) -> str:
        """Since when it waits, why, and what to do where waiting does not help."""
        if self.state != "PENDING":
            return ""
        said = f"waits since {self.since.replace('T', ' ')}: {self.reason}"
        return "; ".join(text for text in (said, self.advice) if text)

    @property
    def advice(self) -> str:
        """What to do where waiting does not help, or not soon; else empty."""
        if advice := HOPELESS.get(self.reason):
            return f"waiting will not help: {advice.replace('JOB', self.job)}"
        slow = [text for begin, text in SLOW.items() if self.reason.startswith(begin)]
        return f"this may last: {slow[0]}" if slow else ""

    @property
    def label(self) -> str:
        """`finetune demo-1a2b`, from the comment that the Slurm plugin gives a job."""
        return self.comment.removeprefix("rule_").replace("_wildcards_", " ")


def jobs_of(root: Path, name: str = "") -> list[QueuedJob]:
    """My Slurm jobs of the working folder ``root`` (only those called ``name``); none where there is no
    Slurm, or where it gives no answer.
    """
    if shutil.which("squeue") is None:
        return []
    command = ["squeue", "--noheader", "--me", f"--format={FORMAT}"]
    command += [f"--name={name}"] if name else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return []
    lines = [line.split("|", 5) for line in done.stdout.splitlines()]
    found = [QueuedJob(*line) for line in lines if len(line) == 6]
    return [job for job in found if Path(job.folder).resolve() == root.resolve()]


def training_of(job: QueuedJob) -> tuple[str, str] | None:
    """Stage and run of a training's job, from the comment that the Slurm plugin gives it; None of other
    jobs.
    """
    for stage in STAGES:
        run = job.comment.removeprefix(f"rule_{stage}_wildcards_")
        if run != job.comment:
            return stage, run
    return None


def with_queue(statuses: Sequence[Status], root: Path) -> list[Status]:
    """The statuses, those that have a job but no process yet as Slurm shows them; trainings without a
    folder last.
    """
    jobs = {key: job for job in jobs_of(root) if (key := training_of(job))}
    newest = {(item.stage, item.run): number for number, item in enumerate(statuses)}
    found = [
        _queued(item, jobs[key]) if number == newest[key] and key in jobs else item
        for number, item in enumerate(statuses)
        for key in [(item.stage, item.run)]
    ]
    return [*found, *_new({key: job for key, job in jobs.items() if key not in newest})]


def _queued(item: Status, job: QueuedJob) -> Status:
    if item.state in ("running", "finished"):
        return item
    return replace(item, state=job.shown_state, where=f"job {job.job}", reason=job.text, log="")


def _new(jobs: dict[tuple[str, str], QueuedJob]) -> Iterator[Status]:
    for (stage, run), job in jobs.items():
        yield Status(stage, run, job.shown_state, where=f"job {job.job}", reason=job.text)


# ---------------------------------------------------------------- while Snakemake waits


def watch_queue(workflow: Any, root: Path) -> None:
    """Says once of each job of this Snakemake why waiting does not help it. To be called when jobs start."""
    if name := requeue.run_name(workflow):
        arguments = (root, name, requeue.interval())
        threading.Thread(target=_watch, args=arguments, name="queue", daemon=True).start()


def _watch(root: Path, name: str, seconds: float) -> None:
    said: set[tuple[str, str]] = set()
    pause = threading.Event()
    while not pause.wait(seconds):
        say_what_waits(root, name, said)


def say_what_waits(root: Path, name: str, said: set[tuple[str, str]]) -> None:
    """Prints jobs called ``name`` that wait in vain; those in ``said`` have been told."""
    for job in jobs_of(root, name):
        if job.state == "PENDING" and job.advice and (job.job, job.reason) not in said:
            said.add((job.job, job.reason))
            print(f"{job.label} (Slurm job {job.job}) {job.text}", file=sys.stderr, flush=True)
