"""What follows from a GPU's memory where the configuration leaves it open (`auto`): the micro-batch, and what
moves to the CPU's memory.

By the configuration alone, not by the survey: the answer is the same before and after anything is fetched.
All trainings of a stage on one kind of job have the same micro-batch, so that they stay comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llava_ext.kernels import layer_interval
from workflow_scripts.config.compute import AUTO, ComputeSpec
from workflow_scripts.config.experiments import Experiment
from workflow_scripts.config.schema import Config
from workflow_scripts.io import UserError
from workflow_scripts.plan.sizes import GB, USABLE, decoder_layers, footprint, longest_allowed, room_of
from workflow_scripts.stages import STAGES

LARGEST = 32
"""The largest micro-batch that is chosen: LLaVA's in stage 1. More is not faster."""
LAYERS_KEY = "kernels.checkpoint_layers"
# In the order in which they cost time; which engines have them.
OFFLOADS = {"none": ("none", "ddp", "zero2", "zero3", "fsdp"), "optimizer": ("zero2", "zero3"),
            "parameters": ("zero3",)}  # fmt: skip

Peak = Callable[[ComputeSpec], float]
"""Bytes that a training takes on each GPU of such a job."""


def fitted(config: Config, experiments: Mapping[str, Experiment]) -> dict[tuple[str, str], ComputeSpec]:
    """Each kind of job by its name and the stage that it computes, with a value in place of every `auto`.

    Raises UserError where no value fits, with what would, and for a number of layers that no model has.
    """
    used: dict[tuple[str, str], list[Experiment]] = {}
    for experiment in experiments.values():
        for stage in STAGES:
            used.setdefault((experiment.stage(stage).compute, stage), []).append(experiment)
    return {key: _fitted(config, *key, found) for key, found in used.items()}


def _fitted(config: Config, name: str, stage: str, experiments: list[Experiment]) -> ComputeSpec:
    compute = config.compute[name]
    _check_layers(config, name, experiments)
    if AUTO not in (compute.per_device_batch_size, compute.offload):
        return compute
    if not compute.gpus_per_node:
        return compute.model_copy(update={"offload": "none"})

    def peak(tried: ComputeSpec) -> float:
        return max(_peak(config, experiment, stage, name, tried) for experiment in experiments)

    tried = list(_candidates(compute, _largest_share(compute, stage, experiments)))
    for candidate in tried:
        if peak(candidate) <= room_of(compute):
            return candidate
    raise UserError(
        f"compute.{name}: {stage} does not fit: it needs up to {peak(tried[-1]) / GB:.0f} GB on each GPU with"
        f" per_device_batch_size: {tried[-1].per_device_batch_size} and offload: {tried[-1].offload}, and"
        f" gpu_gb is {compute.gpu_gb:g}; what would fit: {alternative(tried[-1], peak)}"
    )


def _check_layers(config: Config, name: str, experiments: list[Experiment]) -> None:
    """Refuses to recompute every Nth of fewer than N layers, which would be the first one alone."""
    interval = layer_interval(config.compute[name].kernels.checkpoint_layers) or 0
    for experiment in experiments:
        layers = decoder_layers(config, experiment)
        if layers is not None and layers < interval:
            raise UserError(
                f"compute.{name}.{LAYERS_KEY}: {interval}: the language model {experiment.model.llm} has"
                f" {layers} layers; allowed: all, none, {AUTO}, or a number N from 1 to {layers}"
            )


def _peak(config: Config, experiment: Experiment, stage: str, name: str, compute: ComputeSpec) -> float:
    longest = longest_allowed(config, experiment, stage)
    found = footprint(config, experiment, stage, compute, longest)
    if found is None:
        raise UserError(
            f"compute.{name}: {AUTO} follows from the sizes of the models, and those of"
            f" {experiment.model.llm} or {experiment.model.vision_tower} are not known before they are"
            " fetched; state layers, hidden_size, intermediate_size and vocabulary_size in models, or give"
            f" numbers instead of {AUTO}"
        )
    return found.needs.peak


def _largest_share(compute: ComputeSpec, stage: str, experiments: list[Experiment]) -> int:
    """Samples of a step that one process computes, where that is the same for all experiments; else what
    divides all.
    """
    batches = [experiment.stage(stage).global_batch_size for experiment in experiments]
    return max(1, math.gcd(*batches) // compute.processes)


def _candidates(compute: ComputeSpec, share: int) -> Iterator[ComputeSpec]:
    """Kinds of job without `auto`, the fastest first."""
    sizes: list[int] = [size for size in range(min(LARGEST, share), 0, -1) if share % size == 0]
    if isinstance(compute.per_device_batch_size, int):
        sizes = [compute.per_device_batch_size]
    offloads = [name for name, engines in OFFLOADS.items() if compute.parallel in engines]
    for offload in offloads if compute.offload == AUTO else [compute.offload]:
        for size in sizes:
            yield compute.model_copy(update={"per_device_batch_size": size, "offload": offload})


def alternative(compute: ComputeSpec, peak: Peak) -> str:
    """What would fit instead of a kind of job that does not, in the words of the configuration."""
    for changes in _cheaper(compute):
        if peak(_changed(compute, changes)) <= room_of(compute):
            return ", ".join(f"{key}: {str(value).lower()}" for key, value in changes.items())
    least = peak(_changed(compute, {"per_device_batch_size": 1, LAYERS_KEY: "all"}))
    return f"more GPUs, or GPUs with more memory (gpu_gb: {math.ceil(least / USABLE / GB)})"


def _changed(compute: ComputeSpec, changes: Mapping[str, Any]) -> ComputeSpec:
    update = {key: value for key, value in changes.items() if key != LAYERS_KEY}
    if LAYERS_KEY in changes:
        update["kernels"] = compute.kernels.model_copy(update={"checkpoint_layers": changes[LAYERS_KEY]})
    return compute.model_copy(update=update)


def _cheaper(compute: ComputeSpec) -> Iterator[dict[str, Any]]:
    """Changes that save memory, those that cost the least time first."""
    changes: dict[str, Any] = {}
    if compute.kernels.checkpoint_layers not in ("all", AUTO):
        changes[LAYERS_KEY] = "all"
        yield dict(changes)
    yield from _smaller_batches(compute, changes)
    if compute.processes > 1 and compute.parallel != "zero3":
        changes["parallel"] = "zero3"
        yield dict(changes)
        yield from _smaller_batches(compute, changes)
    yield from _offloads(compute, changes)


def _offloads(compute: ComputeSpec, changes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The optimizer, then everything, in the CPU's memory, with an engine that can do it."""
    parallel = changes.get("parallel", compute.parallel)
    for offload, engines in OFFLOADS.items():
        if offload != "none":
            engine = {} if parallel in engines else {"parallel": engines[0]}
            yield {**changes, **engine, "per_device_batch_size": 1, "offload": offload}


def _smaller_batches(compute: ComputeSpec, changes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    whole = int(compute.per_device_batch_size)
    size = whole
    while size > 1:
        size = size // 2
        if whole % size == 0:
            yield {**changes, "per_device_batch_size": size}
