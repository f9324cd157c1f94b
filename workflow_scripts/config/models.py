"""Model folders: where a language model or a vision tower comes from. Each is prepared, never edited."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from llava_ext.model.projectors import PROJECTORS
from workflow_scripts.config.base import StrictModel
from workflow_scripts.config.shapes import ShapesLlm, ShapesTower
from workflow_scripts.config.types import Positive

Role = Literal["llm", "vision_tower", "checkpoint"]
PROJECTOR_PATTERN = f"^({'|'.join(entry.pattern for entry in PROJECTORS)})$"


# What the model's own files say too: stating it names no other training.
KNOWN_BEFOREHAND = frozenset(
    {"image_size", "patch_size", "layers", "hidden_size", "intermediate_size", "vocabulary_size"}
)


class PreparedModel(StrictModel):
    """What a model from the hub and one from a path have in common."""

    role: Role
    """What the model is used as: `llm`, `vision_tower`, or `checkpoint`: a whole LLaVA, which an experiment
    names as its `checkpoint` and which is not trained here.
    """
    layout: Literal["hf", "llava"] = "hf"
    """Of a checkpoint: `hf` (transformers' LLaVA, or one that this workflow has exported) or `llava` (the
    original layout, which is converted; it takes the experiment's vision tower from `models`).
    """
    patch_do_sample: bool = True
    """Set `do_sample: true` in the prepared copy's `generation_config.json` where it has a temperature or
    top_p without it: otherwise saving fails after stage 2.
    """
    image_size: Positive | None = None
    """Side of the vision tower's pictures in pixels, as its image processor gives them. Stated here, flags
    like `final_spatial_size` are checked against the tower's grid before anything is downloaded.
    """
    patch_size: Positive | None = None
    """Side of the vision tower's patches in pixels."""
    layers: Positive | None = None
    """Number of its layers; stated here for a vision tower, the layer picks are checked before anything is
    downloaded.
    """
    hidden_size: Positive | None = None
    """Its width. With `layers`, `intermediate_size` and `vocabulary_size` of the LLM the plan says how much
    memory a GPU needs before anything is downloaded; afterwards the prepared model says it.
    """
    intermediate_size: Positive | None = None
    """Width of its MLPs."""
    vocabulary_size: Positive | None = None
    """Tokens of an LLM."""

    @model_validator(mode="after")
    def _layout_of_a_checkpoint(self) -> Self:
        if self.layout != "hf" and self.role != "checkpoint":
            raise ValueError(
                f"layout: found {self.layout}, but role: {self.role} has one layout only; leave it out, or"
                " set role: checkpoint"
            )
        return self


class HubModel(PreparedModel):
    """A model repository of the Hugging Face hub at a pinned revision."""

    NOT_IN_RECIPE: ClassVar[frozenset[str]] = KNOWN_BEFOREHAND | {"bytes"}

    kind: Literal["hub"]
    repo: Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")]
    """Repository, `owner/name`."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{7,40}$")]
    """The commit, in hex: a branch can change under a long training."""
    bytes: Positive | None = None
    """Size of the download, for the plan."""
    ignore: tuple[str, ...] = (
        "*.msgpack",
        "*.h5",
        "*.onnx",
        "*.ot",
        "*.md",
        "*.gguf",
        "flax_model*",
        "tf_model*",
    )
    """File patterns that are not downloaded."""


class PathModel(PreparedModel):
    """A model folder that you already have (a snapshot folder of a hub cache works too)."""

    NOT_IN_RECIPE: ClassVar[frozenset[str]] = KNOWN_BEFOREHAND

    kind: Literal["path"]
    path: str
    """The folder, with a `config.json` and the weights in it. It is not changed."""


ModelSpec = Annotated[HubModel | PathModel | ShapesLlm | ShapesTower, Field(discriminator="kind")]


def _trainable(value: object) -> object:
    if value == "identity":
        raise ValueError(
            "linear or mlpNx_gelu (mlp2x_gelu is LLaVA's): identity has no weights to train; choose one of"
            " them"
        )
    return value


class ModelSection(StrictModel):
    """Which models an experiment is built from."""

    llm: str
    """Name of a model with `role: llm`."""
    vision_tower: str
    """Name of a model with `role: vision_tower`."""
    projector_type: Annotated[str, BeforeValidator(_trainable), Field(pattern=PROJECTOR_PATTERN)] = (
        "mlp2x_gelu"
    )
    """The projector: `linear` or `mlpNx_gelu`, as LLaVA names them."""
    vision_feature_layer: Annotated[int, Field(strict=True)] = -2
    """The tower's layer whose features are used; negative counts from the end. Ignored with
    `use_multilayer_features`, which has its own picks."""
    vision_feature_select: Literal["patch", "cls_patch"] = "patch"
    """`patch` leaves out what stands before the patches (class token, registers), `cls_patch` keeps it."""
