"""What a training asks of Snakemake and Slurm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workflow_scripts.config.compute import ComputeSpec


@dataclass(frozen=True)
class StepJob:
    """What a step that is no training asks of a cluster. ``mem_mb``: None where the configuration says it."""

    threads: int
    runtime: int
    mem_mb: int | None = None


STEP_JOBS = {
    "scan": StepJob(threads=8, runtime=360, mem_mb=8000),
    "mixture": StepJob(threads=1, runtime=120, mem_mb=8000),
    "survey": StepJob(threads=8, runtime=120, mem_mb=8000),
    "prepare_questions": StepJob(threads=1, runtime=240, mem_mb=16000),
    "lmms_scores": StepJob(threads=1, runtime=120, mem_mb=8000),
    "export": StepJob(threads=1, runtime=120),
    "predict": StepJob(threads=1, runtime=120),
    "diagnose": StepJob(threads=1, runtime=60),
}


def resources_of(compute: ComputeSpec) -> dict[str, Any]:
    """What a training asks of a cluster; None where it asks for nothing.

    With several machines the job runs in the batch script on the first of them (`mpi`), because only from
    there an inner `srun` sees the whole allocation. `--signal` lets a training save ahead of its time limit.
    """
    several = compute.nodes > 1
    gres = compute.gres or (f"gpu:{compute.gpus_per_node}" if compute.gpus_per_node else None)
    extra = f"--signal=TERM@{compute.save_before_end_s} --open-mode=append"
    return {
        "mem_mb": compute.mem_mb,
        "runtime": compute.runtime_min,
        "nodes": compute.nodes,
        "gres": gres,
        "mpi": "srun" if several else None,
        "tasks": compute.nodes if several else None,
        "tasks_per_gpu": 0 if gres else None,
        "slurm_extra": f"{extra} --ntasks-per-node=1" if several else extra,
        "train_slots": 1 if compute.gpus_per_node else 0,
    }
