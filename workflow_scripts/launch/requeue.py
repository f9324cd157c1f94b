"""Brings preempted Slurm jobs back where Slurm itself only ends them (PreemptMode=CANCEL).

Snakemake's Slurm plugin takes a preempted job for one that Slurm resumes, and waits for it. Slurm does so
with PreemptMode=REQUEUE only; with CANCEL somebody has to put the job into the queue again, under the same
number. A thread of the main Snakemake does, as long as that lives. It touches no job of anybody else, and its
failures are no failures of the workflow.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from workflow_scripts.launch import slurm

# The tests' Slurm is quicker than real ones.
INTERVAL = "LLAVA_REQUEUE_INTERVAL_S"
INTERVAL_S = 30.0


def run_name(workflow: Any) -> str:
    """The name of all Slurm jobs of this Snakemake, an empty text where another executor runs them."""
    # Neither has a public name. Jobs of an earlier Snakemake, in the same folder, must stay as they are:
    # their trainings have been submitted again.
    return str(getattr(getattr(workflow.scheduler, "_executor", None), "run_uuid", ""))


def watch(workflow: Any) -> threading.Thread | None:
    """Starts the thread, where jobs run on Slurm. To be called by the main Snakemake when it starts its
    jobs.
    """
    name = run_name(workflow)
    if not name:
        return None
    thread = threading.Thread(target=_watch, args=(name, interval()), name="requeue", daemon=True)
    thread.start()
    return thread


def interval() -> float:
    """Seconds between two questions to Slurm."""
    try:
        return max(0.1, float(os.environ.get(INTERVAL, INTERVAL_S)))
    except ValueError:
        return INTERVAL_S


def _watch(name: str, seconds: float) -> None:
    refused: set[str] = set()
    pause = threading.Event()
    while not pause.wait(seconds):
        try:
            requeue_preempted(name, refused)
        except Exception as error:  # noqa: BLE001 - the next round may do better, and the workflow goes on without
            print(f"asking Slurm for preempted jobs failed: {error}", file=sys.stderr, flush=True)


def requeue_preempted(name: str, refused: set[str]) -> None:
    """Requeues the preempted jobs of this name. Those that Slurm refuses are noted in ``refused`` and said
    once.
    """
    for job in slurm.preempted_jobs(name):
        if job in refused:
            continue
        problem = slurm.requeue(job)
        # With PreemptMode=REQUEUE Slurm may have been faster; then the job is not preempted any more.
        if problem is None:
            said = "was preempted and is in the queue again; Slurm holds it back for about two minutes"
        elif job in slurm.preempted_jobs(name):
            refused.add(job)
            said = (
                f"was preempted and Slurm does not take it back ({problem}); stop Snakemake and start it"
                " again"
            )
        else:
            continue
        print(f"Slurm job {job} {said}", file=sys.stderr, flush=True)
