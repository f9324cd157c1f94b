"""Floating-point operations of a training: what its matrix products need, not what computing them some way
adds.

Two for a weight and a token it meets, forward. As many backward for what a layer hands down, and as many
again for its weights where they train. Attention: four for a pair of tokens (of a token and one that it
sees), a layer and a unit of its width, forward; twice that backward. Logits only where a label counts.
Neither what is recomputed nor padding counts, so that two ways to compute the same step can be compared.

Plain arithmetic for the trainer, the plan and the benchmark; docs/training.md has the formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TERA = 1e12
# Dense bf16 products of a card, FLOP/s, as its maker states them, by the name that torch gives the device.
# Where the maker states sparse products, half of that.
CARDS: Mapping[str, float] = {
    "NVIDIA A10": 125e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA RTX A6000": 154.8e12,
}


@dataclass(frozen=True)
class Counted:
    """What a step, or a whole training, computes.

    Attributes:
        tokens: in the LLM, vision tokens included, padding not.
        pairs: of a token and one that it sees, itself included: L (L + 1) / 2 of a sample of L tokens.
        labels: places whose logits are computed.
        images: pictures that the tower sees.
    """

    tokens: float
    pairs: float
    labels: float
    images: float


@dataclass(frozen=True)
class Products:
    """The matrix products of a model, and which of them learn.

    Attributes:
        layers: weights of the LLM's layers.
        attention: layers times the width of the attention (heads times their size).
        head: weights of the LLM's head.
        adapters: weights of adapters beside the layers.
        picture: operations of the tower for one picture, forward.
        patches: vectors of a picture that the projector maps.
        projector: weights of the projector's first layer, and of all others.
        learns: the LLM's layers train.
        head_learns: its head trains.
        projects: the projector trains.
        sees: the tower trains.
    """

    layers: float
    attention: float
    head: float
    picture: float
    patches: int
    projector: tuple[float, float]
    adapters: float = 0.0
    learns: bool = False
    head_learns: bool = False
    projects: bool = True
    sees: bool = False

    def flops(self, counted: Counted) -> float:
        """Operations of a forward and a backward pass."""
        layers = 2 * counted.tokens * (self.layers * (2 + self.learns) + 3 * self.adapters)
        attention = 3 * 4 * self.attention * counted.pairs
        head = 2 * self.head * counted.labels * (2 + self.head_learns)
        return layers + attention + head + self._seen() * counted.images

    def forward(self, counted: Counted) -> float:
        """Operations of a forward pass alone, adapters merged: what answers take."""
        first, others = self.projector
        picture = self.picture + 2 * self.patches * (first + others)
        attention = 4 * self.attention * counted.pairs
        weights = self.layers * counted.tokens + self.head * counted.labels
        return 2 * weights + attention + picture * counted.images

    def _seen(self) -> float:
        """Operations for one picture, up to its vision tokens. Nothing is handed down to what does not train
        and has nothing that trains below it.
        """
        first, others = self.projector
        forward = first + others
        down = (first if self.sees else 0) + (others if self.projects or self.sees else 0)
        learning = forward if self.projects else 0
        return 2 * self.patches * (forward + down + learning) + self.picture * (3 if self.sees else 1)


def attention_width(text: Mapping[str, Any]) -> int:
    """Heads times their size, from the entries of a language model's ``config.json``."""
    heads = text.get("num_attention_heads") or 1
    return int(heads * text["head_dim"]) if text.get("head_dim") else int(text["hidden_size"])


def layer_weights(text: Mapping[str, Any]) -> int:
    """Weights in the matrix products of one layer of a language model."""
    heads, width = text.get("num_attention_heads") or 1, attention_width(text)
    shared = text.get("num_key_value_heads") or heads
    attention = 2 * width * (1 + shared / heads)
    return round(text["hidden_size"] * (attention + 3 * text["intermediate_size"]))


def lora_weights(text: Mapping[str, Any], rank: int) -> int:
    """Weights of adapters of that rank on every linear layer of a language model, as LLaVA's LoRA has
    them.
    """
    heads, width = text.get("num_attention_heads") or 1, attention_width(text)
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    narrow = width * (text.get("num_key_value_heads") or heads) / heads
    sides = 2 * (hidden + width) + 2 * (hidden + narrow) + 3 * (hidden + inner)
    return round(text["num_hidden_layers"] * rank * sides)


def picture_flops(vision: Mapping[str, Any], side: int, before: int) -> float:
    """Operations of a vision tower for one picture, forward, from the entries of its ``config.json``.

    Args:
        side: patches along one side of the picture.
        before: tokens that stand before the patches.
    """
    width, layers = vision["hidden_size"], vision["num_hidden_layers"]
    inner = vision.get("intermediate_size") or width * vision["mlp_ratio"]  # DINOv2 has the latter
    weights = layers * (4 * width**2 + 2 * width * inner)
    tokens = side * side + before
    patches = 2 * side * side * width * vision.get("num_channels", 3) * vision["patch_size"] ** 2
    return float(2 * weights * tokens + 4 * layers * width * tokens**2 + patches)
