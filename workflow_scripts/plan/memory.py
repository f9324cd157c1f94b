"""The memory that a training takes on each GPU, before anything is downloaded: as far as the sizes of its
models are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ext.distributed.estimate import Decoder, Needs, Work, layout_of, needs
from llava_ext.kernels import recomputed_layers
from workflow_scripts.config.checks import tower_facts
from workflow_scripts.config.compute import ComputeSpec
from workflow_scripts.io import read_json
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plan.runs import Run
from workflow_scripts.plan.tokens import surveyed_layout
from workflow_scripts.stages import STAGES

LAYERS_KEY = "kernels.checkpoint_layers"

GB = 1e9
# What allocator, kernels and libraries take beside what is counted.
USABLE = 0.92
CAPTION_TOKENS = 128
"""Text of a caption sample, at most, where no survey says it."""
SPLIT = {"none": 0, "ddp": 0, "zero2": 2, "zero3": 3, "fsdp": 3}

# What a model's section may state, by the names of its config.json.
STATED = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "vocabulary_size": "vocab_size",
}


@dataclass(frozen=True)
class Sizes:
    """The LLM's sizes, and the weights of tower and projector."""

    decoder: Decoder
    tower: float
    projector: float


def sizes_of(plan: Plan, run: Run) -> Sizes | None:
    """Sizes of the models of a training; None where they are not known yet."""
    model = plan.experiments[run.experiment].model
    try:
        decoder = Decoder.of(_known(plan, model.llm))
        tower = _known(plan, model.vision_tower)
        width = tower["hidden_size"]
        layer = 4 * width**2 + 2 * width * tower["intermediate_size"]
        weights = float(tower["num_hidden_layers"] * layer)
    except KeyError:
        return None
    return Sizes(decoder, weights, float((width + decoder.hidden) * decoder.hidden))


def _known(plan: Plan, name: str) -> dict[str, Any]:
    """What is known of a model, by the names of its ``config.json``: the prepared copy's, else what the
    configuration states, else the folder's that it names.
    """
    manifest, spec = Path("models") / name / "manifest.json", plan.config.models[name]
    if manifest.is_file():
        return _read(manifest.parent / read_json(manifest)["folder"] / "config.json")
    stated = {theirs: getattr(spec, ours, None) for ours, theirs in STATED.items()}
    found = {key: value for key, value in stated.items() if value is not None}
    return (_read(Path(spec.path).expanduser() / "config.json") if spec.kind == "path" else {}) | found


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.is_file() else {}
    found: dict[str, Any] = content.get("vision_config", content)
    return {key: value for key, value in found.items() if value is not None}


def longest_sample(plan: Plan, run: Run) -> int:
    """Tokens of the longest sample: the survey's, or what the configuration allows."""
    found = surveyed_layout(plan, run)
    if found is not None:
        return int(found["all"]["length"]["longest"])
    experiment = plan.experiments[run.experiment]
    spec = experiment.stage(run.stage)
    side = tower_facts(plan.config, experiment.model.vision_tower)["side"]
    if spec.prompt_version == "plain" and side is not None:
        return min(spec.model_max_length, experiment.interventions.tokens_per_image(side) + CAPTION_TOKENS)
    return spec.model_max_length


def needs_of(plan: Plan, run: Run, compute: ComputeSpec | None = None) -> Needs | None:
    """What a training takes on each GPU; None on the CPU, and where the models' sizes are not known yet."""
    compute = compute or plan.compute(run.stage, run.name)
    sizes = sizes_of(plan, run)
    if sizes is None or not compute.gpus_per_node:
        return None
    spec = plan.experiments[run.experiment].stage(run.stage)
    learns = STAGES[run.stage].trains_llm
    half = compute.precision != "fp32"
    trained = sizes.projector if spec.train_projector else 0.0
    if learns:
        trained += sizes.decoder.weights if spec.lora is None else sizes.decoder.lora_weights(spec.lora.r)
    trained += sizes.tower if spec.train_vision_tower else 0.0
    adapters = sizes.decoder.lora_weights(spec.lora.r) if spec.lora else 0
    whole = sizes.decoder.weights + sizes.tower + sizes.projector + adapters
    layout = layout_of(
        split=SPLIT[compute.parallel],
        parts=compute.processes,
        half=half,
        engine=compute.parallel.startswith("zero"),
        foreach=True,
        offload=compute.offload,
    )
    work = Work(
        tokens=compute.per_device_batch_size * longest_sample(plan, run),
        checkpointed=recomputed_layers(compute.kernels.checkpoint_layers, sizes.decoder.layers),
        learns=learns,
        fusion=compute.kernels.fusion,
        element=2 if half else 4,
    )
    return needs(sizes.decoder, layout, trained, whole - trained, work)


def problem_of(plan: Plan, run: Run) -> str | None:
    """What is said when a training does not fit on its GPUs: both numbers, and what would fit."""
    compute = plan.compute(run.stage, run.name)
    found = needs_of(plan, run, compute)
    if found is None or compute.gpu_gb is None or found.peak <= USABLE * compute.gpu_gb * GB:
        return None
    name = plan.experiments[run.experiment].stage(run.stage).compute
    instead = next(
        (
            ", ".join(f"{key}: {str(value).lower()}" for key, value in changes.items())
            for changes in _cheaper(compute)
            if _fits(plan, run, compute, changes)
        ),
        "more GPUs, or GPUs with more memory",
    )
    return (
        f"{run.stage} {run.name} needs up to {found.peak / GB:.0f} GB on each GPU, compute.{name} has gpu_gb:"
        f" {compute.gpu_gb:g}; what would fit: {instead}"
    )


def _fits(plan: Plan, run: Run, compute: ComputeSpec, changes: dict[str, Any]) -> bool:
    others = {key: value for key, value in changes.items() if key != LAYERS_KEY}
    if LAYERS_KEY in changes:
        others["kernels"] = compute.kernels.model_copy(update={"checkpoint_layers": changes[LAYERS_KEY]})
    tried = needs_of(plan, run, compute.model_copy(update=others))
    return tried is not None and tried.peak <= USABLE * (compute.gpu_gb or 0) * GB


def _cheaper(compute: ComputeSpec) -> Iterator[dict[str, Any]]:
    """Changes that save memory, those that cost the least time first."""
    changes: dict[str, Any] = {}
    if compute.kernels.checkpoint_layers != "all":
        changes[LAYERS_KEY] = "all"
        yield dict(changes)
    yield from _smaller_batches(compute, changes)
    if compute.processes > 1 and compute.parallel != "zero3":
        changes["parallel"] = "zero3"
        yield dict(changes)
        yield from _smaller_batches(compute, changes)
    if changes.get("parallel", compute.parallel).startswith("zero"):
        for offload in ("optimizer", "parameters"):
            if changes.get("parallel", compute.parallel) == "zero3" or offload == "optimizer":
                yield {**changes, "per_device_batch_size": 1, "offload": offload}


def _smaller_batches(compute: ComputeSpec, changes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    size = compute.per_device_batch_size
    while size > 1:
        size = size // 2
        if compute.per_device_batch_size % size == 0:
            yield {**changes, "per_device_batch_size": size}
