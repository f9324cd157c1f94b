"""The training stages and what an experiment may change about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, create_model, model_validator

from llava_ext.data.templates import TEMPLATES, described
from workflow_scripts.config.base import StrictModel
from workflow_scripts.config.types import NonNegative, Positive, Rate, Seed, Share
from workflow_scripts.stages import STAGES

if TYPE_CHECKING:
    PromptVersion = str
else:
    PromptVersion = Literal[tuple(TEMPLATES)]


class LoraSpec(StrictModel):
    """Low-rank adaptation of the LLM in stage 2; merged on export."""

    r: Positive = 128
    """Rank."""
    alpha: Positive = 256
    """Scale of the update: alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout before the low-rank update."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained."""


class SurveyBounds(StrictModel):
    """What the survey of a stage's mixture may find, as shares of its samples, before it stops the workflow.
    `max_mismatch_share` and `min_supervised_share` are counted there too, over all records.
    """

    max_unlabelled_share: Share = 0.05
    """Samples of a source without any label after the cut, those aside that are masked by a mismatch."""
    max_cut_share: Share = 0.1
    """Samples of the mixture that are longer than `model_max_length`."""
    max_picture_cut_share: Share = 0.01
    """Samples of the mixture that lose tokens of a picture by the cut."""


class StageSpec(StrictModel):
    """One training stage: its data, its recipe, and the kind of job that computes it."""

    # How it is computed, shown or kept, not what it computes: these never make another run.
    NOT_IN_RECIPE: ClassVar[frozenset[str]] = frozenset(
        {
            "compute",
            "save_steps",
            "save_total_limit",
            "keep_states",
            "logging_steps",
            "max_mismatch_share",
            "min_supervised_share",
            "survey",
            "report_to",
        }
    )

    mixture: str
    """Name of the mixture to train on."""
    compute: str
    """Name of the kind of job (section `compute`)."""
    prompt_version: Annotated[PromptVersion, Field(description=f"Prompt template: {described()}.")]
    image_aspect_ratio: Literal["square", "pad"] = "pad"
    """`square`: as the tower's image processor does (CLIP and DINOv2 crop, SigLIP squeezes; LLaVA's stage
    1). `pad`: pad to a square with the mean colour (stage 2).
    """
    learning_rate: Rate
    """Peak learning rate."""
    mm_projector_lr: Rate | None = None
    """Another learning rate for the projector."""
    epochs: Rate | None = None
    """Passes over the mixture. Give either this or `max_steps`."""
    max_steps: Positive | None = None
    """Optimizer steps. Give either this or `epochs`."""
    global_batch_size: Positive
    """Samples in one optimizer step, over all GPUs. It is what counts for the result, so it stays when the
    number of GPUs changes; accumulation follows from it.
    """
    warmup_ratio: Share = 0.03
    """Share of the steps in which the learning rate rises."""
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr"] = (
        "cosine"
    )
    """Learning-rate schedule after the warm-up."""
    min_lr_rate: Share | None = None
    """With `scheduler: cosine_with_min_lr`: where the rate ends, as a share of its peak."""
    weight_decay: NonNegative = 0.0
    """AdamW's weight decay."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's first decay rate."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's second decay rate."""
    max_grad_norm: NonNegative = 1.0
    """Gradient clipping; 0 turns it off."""
    model_max_length: Positive = 2048
    """Longest sequence in tokens, image tokens included; longer ones are cut."""
    group_by_modality_length: bool = False
    """Batches of samples of similar length, with and without pictures apart (LLaVA's stage 2)."""
    seed: Seed = 42
    """Seed of the initialisation and of the order of the data."""
    train_projector: bool = True
    """Train the projector. `false` freezes it in stage 2 (LLaVA's `freeze_mm_mlp_adapter`)."""
    train_vision_tower: bool = False
    """Train the vision tower too, as far as gradients reach it. Stage 2 begins with the tower that stage 1
    has trained.
    """
    vision_tower_learning_rate: Rate | None = None
    """Another learning rate for the vision tower; only with `train_vision_tower`."""
    lora: LoraSpec | None = None
    """Train low-rank updates of the LLM instead of all its weights; not in `pretrain`."""
    save_steps: Positive = 500
    """Full training state is saved every so many steps."""
    save_total_limit: Positive = 2
    """Saved states that are kept; the last complete one is never deleted."""
    keep_states: bool = False
    """Keep the saved states (optimizer and all) of a finished training. They are many times as large as
    its weights and only needed to continue it, so they are deleted once the final weights are written and
    verified.
    """
    logging_steps: Positive = 1
    """Metrics are written every so many steps."""
    loss_normalization: Literal["micro_batch", "token"] = "micro_batch"
    """`micro_batch`: the mean of the micro-batches' means, as LLaVA; `token`: the mean over all supervised
    tokens of the step, which does not depend on the number of GPUs.
    """
    min_supervised_share: Share = 0.01
    """Training stops before it starts when fewer than this share of the tokens carry a label."""
    max_mismatch_share: Share = 0.05
    """Training stops before it starts when more than this share of a source's samples has no supervised token
    because the template and the tokenizer disagree ("tokenization mismatch").
    """
    survey: SurveyBounds = SurveyBounds()
    """Further bounds of the survey."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where metrics go besides `metrics.jsonl`."""

    @model_validator(mode="after")
    def _one_length(self) -> StageSpec:
        if (self.epochs is None) == (self.max_steps is None):
            found = "both" if self.epochs is not None else "neither"
            raise ValueError(f"give either epochs or max_steps, found {found}")
        if self.vision_tower_learning_rate is not None and not self.train_vision_tower:
            raise ValueError(
                f"vision_tower_learning_rate: found {self.vision_tower_learning_rate}, but the tower does not"
                " train; set train_vision_tower: true, or leave it out"
            )
        if self.mm_projector_lr is not None and not self.train_projector:
            raise ValueError(
                f"mm_projector_lr: found {self.mm_projector_lr}, but the projector does not train; leave it"
                " out, or set train_projector: true"
            )
        if (self.scheduler == "cosine_with_min_lr") != (self.min_lr_rate is not None):
            raise ValueError(
                "scheduler: cosine_with_min_lr and min_lr_rate belong together; give both or neither"
            )
        return self


def partial_model(model: type[StrictModel], name: str, doc: str) -> type[StrictModel]:
    """A model with the same fields, all of them optional: what an experiment may override."""
    fields: dict[str, Any] = {
        key: (
            Annotated[field.rebuild_annotation() | None, Field(description=field.description)],
            None,
        )
        for key, field in model.model_fields.items()
    }
    partial = create_model(name, __base__=StrictModel, __doc__=doc, **fields)
    partial.documented_like = model
    return partial


StageOverrides = partial_model(
    StageSpec, "StageOverrides", "What an experiment changes about a stage; all fields are optional."
)

Stages = create_model(
    "Stages",
    __base__=StrictModel,
    __doc__="The stages of LLaVA's recipe.",
    **{stage.name: (StageSpec, Field(description=stage.purpose)) for stage in STAGES.values()},  # type: ignore[call-overload]
)
