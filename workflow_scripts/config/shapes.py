"""The demo's own kinds of source and model: drawn pictures, a tiny language model, a tiny vision tower."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from workflow_scripts.config.base import StrictModel
from workflow_scripts.config.sources import Source
from workflow_scripts.config.types import Seed


class ShapesDamage(StrictModel):
    """How many pictures of a drawn source are damaged on purpose, by kind of damage."""

    truncated: int = Field(default=0, ge=0)
    """JPEG files that end in the middle of their data."""
    corrupt: int = Field(default=0, ge=0)
    """JPEG files with overwritten bytes: ordinary viewers open them, libjpeg warns."""
    gif_as_jpg: int = Field(default=0, ge=0)
    """Whole GIF files under a name that ends in .jpg."""
    png_as_jpg: int = Field(default=0, ge=0)
    """Whole PNG files under a name that ends in .jpg."""
    html_as_jpg: int = Field(default=0, ge=0)
    """Error pages saved as .jpg, as a careless downloader leaves them."""
    empty: int = Field(default=0, ge=0)
    """Files of zero bytes."""
    missing: int = Field(default=0, ge=0)
    """Samples whose picture is not in the archive."""

    def total(self) -> int:
        """The number of damaged pictures of all kinds."""
        return sum(self.counts().values())

    def counts(self) -> dict[str, int]:
        """The numbers by kind, in the order in which pictures are taken."""
        return {name: getattr(self, name) for name in type(self).model_fields}


class ShapesSource(Source):
    """Pictures of coloured shapes with LLaVA-format annotations, drawn on this machine; no download.

    Equal specs give equal bytes.
    """

    kind: Literal["shapes"] = "shapes"
    split: Literal["captions", "questions", "test"]
    """What is said about the pictures: `captions` (stage 1), `questions` (stage 2, several turns a picture),
    `test` (one question a record, with its type, for the evaluation)."""
    pictures: int = Field(ge=1, le=1_000_000)
    """Number of pictures, damaged and missing ones included."""
    archive: Literal["zip", "tar", "folder"] = "zip"
    """What the pictures are packed in."""
    seed: Seed = 0
    """Other seeds give other pictures."""
    image_size: int = Field(default=56, ge=28, le=1024)
    """Side of the pictures, in pixels."""
    turns: int = Field(default=5, ge=1, le=12)
    """Questions about each one-shape picture of a `questions` source."""
    two_shapes_share: float = Field(default=0.2, ge=0, le=1)
    """Share of pictures with two shapes; these are only asked about their number."""
    text_only: int = Field(default=0, ge=0)
    """Records without a picture, added to a `questions` source."""
    damage: ShapesDamage = ShapesDamage()
    """Pictures to damage on purpose; `damaged.json` beside the annotations lists them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.damage.total() > self.pictures:
            raise ValueError(
                f"damage: {self.damage.total()} pictures are to be damaged, but pictures is {self.pictures}; "
                "lower the numbers under damage or raise pictures"
            )
        if self.text_only and self.split != "questions":
            raise ValueError(
                f"text_only: {self.text_only} records without a picture are only possible with split:"
                f" questions, not with split: {self.split}; remove text_only or change the split"
            )
        return self


def _check_heads(hidden_size: int, heads: int) -> None:
    if hidden_size % heads or (hidden_size // heads) % 2:
        raise ValueError(
            f"hidden_size: {hidden_size} can't be divided into {heads} heads of an even size; "
            f"use a multiple of {2 * heads} or another number of heads"
        )


class ShapesLlm(StrictModel):
    """A tiny Llama with random weights and a tokenizer trained on the demo's sentences."""

    kind: Literal["shapes_llm"] = "shapes_llm"
    role: Literal["llm"] = "llm"
    """What the experiments may use it as."""
    seed: Seed = 0
    """Seed of the weights."""
    hidden_size: int = Field(default=64, ge=8)
    """Width."""
    intermediate_size: int = Field(default=128, ge=8)
    """Width of the MLPs."""
    layers: int = Field(default=2, ge=1)
    """Number of decoder layers."""
    heads: int = Field(default=4, ge=1)
    """Attention heads."""
    initializer_range: float = Field(default=0.05, gt=0)
    """Standard deviation of the weights: at this width Llama's 0.02 learns more slowly."""
    max_positions: int = Field(default=512, ge=128)
    """Longest sequence."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_heads(self.hidden_size, self.heads)
        return self


class ShapesTower(StrictModel):
    """A tiny CLIP vision tower, pre-trained for seconds to tell the demo's shapes, colours and places
    apart.
    """

    kind: Literal["shapes_tower"] = "shapes_tower"
    role: Literal["vision_tower"] = "vision_tower"
    """What the experiments may use it as."""
    seed: Seed = 0
    """Seed of the weights and of the pictures that it is trained on."""
    steps: int = Field(default=200, ge=0)
    """Contrastive pre-training steps; 0 leaves the tower random."""
    batch_size: int = Field(default=64, ge=2)
    """Pictures a step."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Highest learning rate of the pre-training."""
    hidden_size: int = Field(default=48, ge=8)
    """Width."""
    layers: int = Field(default=4, ge=2)
    """Number of encoder layers."""
    heads: int = Field(default=4, ge=1)
    """Attention heads."""
    image_size: int = Field(default=56, ge=28)
    """Side of the picture in pixels, a multiple of patch_size."""
    patch_size: int = Field(default=14, ge=4)
    """Side of a patch in pixels."""
    position_std: float = Field(default=0.5, gt=0)
    """Standard deviation of the position embeddings: with CLIP's 0.02 so small a tower carries no
    position.
    """

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_heads(self.hidden_size, self.heads)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size: {self.image_size} is no multiple of patch_size {self.patch_size}; "
                f"use {self.image_size // self.patch_size * self.patch_size} or another patch_size"
            )
        return self
