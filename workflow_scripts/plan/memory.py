"""The memory that a training takes on each GPU, before anything is downloaded: as far as the sizes of its
models are known.
"""

from __future__ import annotations

from llava_ext.distributed.estimate import Needs
from workflow_scripts.config.compute import ComputeSpec
from workflow_scripts.plan.fitting import alternative
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plan.runs import Run
from workflow_scripts.plan.sizes import GB, Footprint, footprint, longest_allowed, room_of
from workflow_scripts.plan.tokens import surveyed_layout


def longest_sample(plan: Plan, run: Run) -> int:
    """Tokens of the longest sample: the survey's, or what the configuration allows."""
    found = surveyed_layout(plan, run)
    if found is not None:
        return int(found["all"]["length"]["longest"])
    return longest_allowed(plan.config, plan.experiments[run.experiment], run.stage)


def footprint_of(plan: Plan, run: Run, compute: ComputeSpec | None = None) -> Footprint | None:
    """A training as the estimate sees it; None on the CPU, and where its models' sizes are not known yet."""
    compute, experiment = compute or plan.compute(run.stage, run.name), plan.experiments[run.experiment]
    return footprint(plan.config, experiment, run.stage, compute, longest_sample(plan, run))


def needs_of(plan: Plan, run: Run, compute: ComputeSpec | None = None) -> Needs | None:
    """What a training takes on each GPU; None on the CPU, and where the models' sizes are not known yet."""
    found = footprint_of(plan, run, compute)
    return found.needs if found else None


def problem_of(plan: Plan, run: Run) -> str | None:
    """What is said when a training does not fit on its GPUs: both numbers, and what would fit."""
    compute = plan.compute(run.stage, run.name)
    found = needs_of(plan, run, compute)
    if found is None or compute.gpu_gb is None or found.peak <= room_of(compute):
        return None
    name = plan.experiments[run.experiment].stage(run.stage).compute

    def peak(tried: ComputeSpec) -> float:
        needs = needs_of(plan, run, tried)
        return needs.peak if needs else float("inf")

    return (
        f"{run.stage} {run.name} needs up to {found.peak / GB:.0f} GB on each GPU, compute.{name} has gpu_gb:"
        f" {compute.gpu_gb:g}; what would fit: {alternative(compute, peak)}"
    )


def chosen(plan: Plan, stage: str, name: str) -> str:
    """What `auto` has come to for one kind of job: for the plan."""
    compute = plan.kinds[name, stage]
    runs = [run for run in plan.trainings() if run.stage == stage and plan.kind(run) == name]
    found = [item for run in runs if (item := footprint_of(plan, run, compute))]
    said = [f"per_device_batch_size: {compute.per_device_batch_size}", f"offload: {compute.offload}"]
    if compute.kernels.checkpoint_layers == "auto" and found:
        counts = [item.recomputed(room_of(compute)) for item in found]
        layers = found[0].decoder.layers
        said.append(f"up to {max(layers if n is None else n for n in counts)} of {layers} layers recomputed")
    return ", ".join(said)
