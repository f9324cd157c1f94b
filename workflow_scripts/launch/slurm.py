"""What the launcher asks Slurm, and nothing when there is no Slurm."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence

from workflow_scripts.io import UserError
from workflow_scripts.launch.command import Nodes

GONE = {
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "PREEMPTED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
}


def job_id() -> str:
    """The Slurm job that this process runs in, or an empty text."""
    return os.environ.get("SLURM_JOB_ID", "")


def output_of(command: Sequence[str], timeout: float = 30) -> str | None:
    """The command's output, or None when it failed or does not exist."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def job_is_alive(job: str, tries: int = 3) -> bool | None:
    """Whether the job still runs or waits; None when Slurm does not answer."""
    command = ["squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T"]
    for again in range(tries):
        if again:
            time.sleep(2)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except FileNotFoundError:
            return None
        except subprocess.TimeoutExpired:
            continue
        if done.returncode == 0:
            return any(state not in GONE for state in done.stdout.split())
        if "Invalid job id" in done.stderr:  # it ended so long ago that Slurm has forgotten it
            return False
    return None


def preempted_jobs(name: str) -> list[str]:
    """The jobs of this name that were preempted, have ended, and are not in the queue again."""
    listed = output_of(["squeue", "--noheader", "--states=PREEMPTED", f"--name={name}", "--format=%A %T"])
    # A job that still saves is COMPLETING, whatever states were asked for.
    return [line.split()[0] for line in (listed or "").splitlines() if line.split()[1:] == ["PREEMPTED"]]


def requeue(job: str) -> str | None:
    """Puts a job that has ended into the queue again; None when Slurm did it, else what it said."""
    done = subprocess.run(
        ["scontrol", "requeue", job], capture_output=True, text=True, timeout=30, check=False
    )
    return None if done.returncode == 0 else done.stderr.strip() or f"scontrol ended with {done.returncode}"


def cancel(job: str, patience_s: float) -> bool:
    """Asks the job to save and end, then insists. True when it is gone."""
    output_of(["scancel", "--state=PENDING", job])  # it waits, perhaps preempted: there is nothing to save
    output_of(["scancel", "--signal=TERM", job])
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if job_is_alive(job) is False:
            return True
        time.sleep(2)
    output_of(["scancel", job])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if job_is_alive(job) is False:
            return True
        time.sleep(2)
    return False


def job_nodes(job: str, wanted: int) -> Nodes:
    """The machines of a job with several of them, from Slurm's own words: variables are stripped from job
    steps.
    """
    shown = output_of(["scontrol", "show", "job", "-o", job]) or ""
    match = re.search(r"\bNodeList=(\S+)", shown)
    names = (output_of(["scontrol", "show", "hostnames", match.group(1)]) or "").split() if match else []
    if len(names) != wanted:
        raise UserError(
            f"the job {job} has {len(names)} machines ({', '.join(names) or 'none found'}), the training"
            f" needs {wanted}; run it with `snakemake --profile slurm`, which asks for them"
        )
    return Nodes(tuple(names), _address(names[0]), 20000 + int(re.sub(r"\D", "", job)) % 12000, job)


def _address(name: str) -> str:
    """Where the first machine answers: its name where that resolves, else the address that Slurm uses."""
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        shown = output_of(["scontrol", "show", "node", "-o", name]) or ""
        match = re.search(r"\bNodeAddr=(\S+)", shown)
        return match.group(1) if match else name
    return name
