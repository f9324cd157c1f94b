"""What a training takes of each GPU by a configuration alone, as far as the sizes of its models are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ext.distributed.estimate import (
    Decoder,
    Layout,
    Needs,
    Work,
    checkpointed_layers,
    layout_of,
    needs,
)
from llava_ext.flops import Products, attention_width, layer_weights, lora_weights, picture_flops
from llava_ext.kernels import recomputed_layers
from workflow_scripts.config.checks import tower_facts
from workflow_scripts.config.compute import ComputeSpec
from workflow_scripts.config.experiments import Experiment
from workflow_scripts.config.schema import Config
from workflow_scripts.io import read_json
from workflow_scripts.stages import STAGES

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
    "patch_size": "patch_size",
}


@dataclass(frozen=True)
class Sizes:
    """The LLM's sizes, and the weights of tower and projector."""

    decoder: Decoder
    tower: float
    projector: float


@dataclass(frozen=True)
class Footprint:
    """A training as the estimate sees it."""

    decoder: Decoder
    layout: Layout
    trained: float
    frozen: float
    work: Work

    @property
    def needs(self) -> Needs:
        """Bytes on each GPU."""
        return needs(self.decoder, self.layout, self.trained, self.frozen, self.work)

    def recomputed(self, room: float) -> int | None:
        """The fewest layers whose recomputation makes it fit into ``room`` bytes; None: it does not fit."""
        return checkpointed_layers(self.decoder, self.layout, self.trained, self.frozen, self.work, room)


def sizes_of(config: Config, experiment: Experiment) -> Sizes | None:
    """Sizes of the models of an experiment; None where they are not known yet."""
    model = experiment.model
    try:
        decoder = Decoder.of(_known(config, model.llm))
        tower = _known(config, model.vision_tower)
        width = tower["hidden_size"]
        layer = 4 * width**2 + 2 * width * tower["intermediate_size"]
        weights = float(tower["num_hidden_layers"] * layer)
    except KeyError:
        return None
    return Sizes(decoder, weights, float((width + decoder.hidden) * decoder.hidden))


def _known(config: Config, name: str) -> dict[str, Any]:
    """What is known of a model, by the names of its ``config.json``: the prepared copy's, else what the
    configuration states, else the folder's that it names.
    """
    spec, content = config.models[name], model_config(config, name)
    if (Path("models") / name / "manifest.json").is_file():
        return _stated_there(content)
    stated = {theirs: getattr(spec, ours, None) for ours, theirs in STATED.items()}
    return _stated_there(content) | {key: value for key, value in stated.items() if value is not None}


def model_config(config: Config, name: str) -> dict[str, Any]:
    """The `config.json` of a model: the prepared copy's, else the folder's that it names; empty before it is
    there.
    """
    manifest, spec = Path("models") / name / "manifest.json", config.models[name]
    if manifest.is_file():
        path = manifest.parent / read_json(manifest)["folder"] / "config.json"
    elif spec.kind == "path":
        path = Path(spec.path).expanduser() / "config.json"
    else:
        return {}
    return dict(read_json(path)) if path.is_file() else {}


def _stated_there(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content.get("vision_config", content)
    return {key: value for key, value in found.items() if value is not None}


def decoder_layers(config: Config, experiment: Experiment) -> int | None:
    """Layers of an experiment's language model; None where they are not known yet."""
    return _known(config, experiment.model.llm).get("num_hidden_layers")


def longest_allowed(config: Config, experiment: Experiment, stage: str) -> int:
    """Tokens of the longest sample that the configuration allows."""
    spec = experiment.stage(stage)
    side = tower_facts(config, experiment.model.vision_tower)["side"]
    if spec.prompt_version == "plain" and side is not None:
        return min(spec.model_max_length, experiment.interventions.tokens_per_image(side) + CAPTION_TOKENS)
    return spec.model_max_length


def footprint(
    config: Config, experiment: Experiment, stage: str, compute: ComputeSpec, longest: int
) -> Footprint | None:
    """A training with samples of at most ``longest`` tokens; None on the CPU, and where the models' sizes are
    not known yet.
    """
    sizes = sizes_of(config, experiment)
    if sizes is None or not compute.gpus_per_node:
        return None
    spec, learns = experiment.stage(stage), STAGES[stage].trains_llm
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
        foreach=False,  # on a GPU training takes the fused Adam
        offload=compute.offload,
    )
    work = Work(
        tokens=int(compute.per_device_batch_size) * longest,
        checkpointed=recomputed_layers(compute.kernels.checkpoint_layers, sizes.decoder.layers),
        learns=learns,
        fusion=compute.kernels.fusion,
        element=2 if half else 4,
    )
    return Footprint(sizes.decoder, layout, trained, whole - trained, work)


def products(config: Config, experiment: Experiment, stage: str) -> Products | None:
    """The matrix products of a training's model, on the CPU too; None where its sizes are not known yet."""
    model, spec, learns = experiment.model, experiment.stage(stage), STAGES[stage].trains_llm
    text, tower = _known(config, model.llm), _known(config, model.vision_tower)
    side, full = tower_facts(config, model.vision_tower)["side"], learns and spec.lora is None
    side = side or (tower["image_size"] // tower["patch_size"] if "image_size" in tower else None)
    try:
        layers, hidden = text["num_hidden_layers"], text["hidden_size"]
        return Products(
            layers=layers * layer_weights(text),
            attention=layers * attention_width(text),
            head=text["vocab_size"] * hidden,
            picture=picture_flops(tower, side or 0, before=1),
            patches=(side or 0) ** 2,
            projector=(tower["hidden_size"] * hidden, hidden**2),
            adapters=lora_weights(text, spec.lora.r) if spec.lora else 0,
            learns=full,
            head_learns=full,
            projects=spec.train_projector,
            sees=spec.train_vision_tower,
        )
    except KeyError:
        return None


def room_of(compute: ComputeSpec) -> float:
    """Bytes of a GPU that a training may take; no bound where its memory is not stated."""
    return float("inf") if compute.gpu_gb is None else USABLE * compute.gpu_gb * GB
