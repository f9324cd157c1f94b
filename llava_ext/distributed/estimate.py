"""How many bytes a training takes on each GPU, from sizes alone: plain arithmetic for the plan, and for the
choice of what is recomputed.

Measured on an H100 80GB with LLaVA-1.5-7B's sizes (docs/training.md, "On GPUs");
`tests/distributed/test_estimate.py` compares every peak that was seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GIB = 2**30
FLOAT32, HALF, ADAM = 4, 2, 8
# ZeRO-3 and FSDP gather a layer while the next one is on its way.
GATHERED_LAYERS = 2
# The layer at work is there once more, and its gradients are as large again.
LAYERS_AT_WORK = 2


@dataclass(frozen=True)
class Decoder:
    """Sizes of a language model: layers, widths, vocabulary, share of key and value heads."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    key_value_share: float = 1.0
    tied: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Decoder:
        """From the entries of a language model's ``config.json``. Raises KeyError where a size is missing."""
        heads = config.get("num_attention_heads")
        shared = config.get("num_key_value_heads")
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            key_value_share=shared / heads if heads and shared else 1.0,
            tied=bool(config.get("tie_word_embeddings")),
        )

    @property
    def layer_weights(self) -> int:
        """Weights of one layer."""
        attention = (2 + 2 * self.key_value_share) * self.hidden**2
        return round(attention + 3 * self.hidden * self.intermediate + 2 * self.hidden)

    @property
    def weights(self) -> int:
        """All weights, the embeddings and the head included."""
        tables = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return self.layers * self.layer_weights + tables + self.hidden

    def lora_weights(self, rank: int) -> int:
        """Weights of adapters of that rank on every linear layer, as LLaVA's LoRA has them."""
        hidden, inner = self.hidden, self.intermediate
        narrow = round(self.key_value_share * hidden)
        sides = 2 * (hidden + hidden) + 2 * (hidden + narrow) + 3 * (hidden + inner)
        return self.layers * rank * sides


@dataclass(frozen=True)
class Saved:
    """Bytes in half precision that one layer keeps of one token for its gradients: for each unit of the width
    and of the MLP's width; where the layer's own weights (or adapters) learn, their inputs too.
    """

    hidden: float
    inner: float
    hidden_learning: float
    inner_learning: float

    def bytes(self, decoder: Decoder, learns: bool) -> float:
        """Of one token in one layer."""
        if learns:
            return self.hidden_learning * decoder.hidden + self.inner_learning * decoder.intermediate
        return self.hidden * decoder.hidden + self.inner * decoder.intermediate


# By the fusion of the element-wise work. Fused norms keep their input once, a fused SwiGLU its two inputs.
SAVED: Mapping[str, Saved] = {
    "none": Saved(hidden=16, inner=6, hidden_learning=23.5, inner_learning=8),
    "liger": Saved(hidden=11.5, inner=4, hidden_learning=19, inner_learning=6),
    "compile": Saved(hidden=12, inner=4, hidden_learning=19.5, inner_learning=6),
}


@dataclass(frozen=True)
class Layout:
    """How weights lie on the GPUs.

    Attributes:
        split: what ``parts`` processes share: 0 nothing, 2 gradients and optimizer (ZeRO-2), 3 the weights
            too (ZeRO-3, FSDP).
        parts: the processes that share.
        weight: bytes of a weight that trains, as the model holds it.
        frozen: bytes of one that does not.
        master: bytes of the optimizer's own copy of a weight, 0 where it is the model's.
        moments: bytes of what the optimizer remembers of a weight.
        at_step: bytes of what the optimizer's step makes for a weight and drops again: a gradient in float32
            beside a half one, and the intermediate results of an Adam that is not fused.
        cast: bytes of the copy of a weight in which the forward pass computes.
        offload: what lies in the CPU's memory: `none`, `optimizer` (and gradients), or `parameters`
            (everything).
    """

    split: int = 0
    parts: int = 1
    weight: int = FLOAT32
    frozen: int = FLOAT32
    master: int = 0
    moments: int = ADAM
    at_step: int = 0
    cast: int = 0
    offload: str = "none"

    def weights(self, trained: float, frozen: float) -> float:
        """Bytes of the weights on each GPU."""
        if self.offload == "parameters":
            return 0
        return (self.weight * trained + self.frozen * frozen) / (self.parts if self.split == 3 else 1)

    def states(self, trained: float) -> float:
        """Bytes of what the optimizer keeps on each GPU."""
        return 0 if self.offload != "none" else (self.master + self.moments) * trained / self._shared

    def gradients(self, trained: float) -> float:
        """Bytes of all gradients on each GPU, before the step."""
        return 0 if self.offload != "none" else self.weight * trained / self._shared

    def step(self, trained: float) -> float:
        """Bytes that come and go within the optimizer's step."""
        return 0 if self.offload != "none" else self.at_step * trained / self._shared

    def bytes(self, trained: float, frozen: float) -> float:
        """Bytes on each GPU that no choice of batch and checkpointing can save."""
        return (
            self.weights(trained, frozen)
            + self.states(trained)
            + self.gradients(trained)
            + self.step(trained)
        )

    @property
    def _shared(self) -> int:
        return self.parts if self.split else 1


def layout_of(split: int, parts: int, half: bool, engine: bool, foreach: bool, offload: str) -> Layout:
    """The layout of an Adam with moments in float32.

    Args:
        split: 0, 2 or 3, as in :class:`Layout`.
        half: the training computes in bf16 or fp16.
        engine: DeepSpeed: half weights, whole masters; otherwise autocast over float32 weights.
        foreach: torch's Adam that is not fused.
    """
    element, at_step = (HALF if half else FLOAT32), FLOAT32 if foreach else 0
    if engine:
        whole = FLOAT32 if half else 0
        return Layout(split, parts, element, element, whole, ADAM, at_step + whole, 0, offload)
    if split == 3:  # FSDP keeps all of its shards in float32
        return Layout(split, parts, at_step=at_step, offload=offload)
    return Layout(split, parts, frozen=element, at_step=at_step, cast=HALF if half else 0, offload=offload)


@dataclass(frozen=True)
class Work:
    """What a micro-batch computes.

    Attributes:
        tokens: of the largest micro-batch, padding included where there is padding.
        checkpointed: layers whose activations are computed again.
        learns: the LLM's weights, or adapters beside them, train.
        fusion: as `--fusion`.
        element: bytes of an activation: 2 in half precision, 4 in float32.
    """

    tokens: int
    checkpointed: int
    learns: bool
    fusion: str = "none"
    element: int = HALF


def activations(decoder: Decoder, work: Work) -> float:
    """Bytes of what a forward pass keeps for the backward pass, and of the layer at work."""
    layer = SAVED[work.fusion].bytes(decoder, work.learns) * work.tokens
    kept = decoder.layers - work.checkpointed + LAYERS_AT_WORK
    inputs = work.checkpointed * HALF * decoder.hidden * work.tokens
    return (kept * layer + inputs) * work.element / HALF


@dataclass(frozen=True)
class Needs:
    """Bytes on each GPU, by what they are for."""

    weights: float
    states: float
    gradients: float
    step: float
    activations: float
    gathered: float = field(default=0.0)

    @property
    def peak(self) -> float:
        """The most at any time: activations leave while gradients come, and are gone at the step."""
        return self.weights + self.states + max(self.activations + self.gathered, self.gradients + self.step)


def needs(decoder: Decoder, layout: Layout, trained: float, frozen: float, work: Work) -> Needs:
    """What a training takes on each GPU.

    Args:
        trained, frozen: weights of the whole model (tower, projector, LLM, adapters) that do and don't train.
    """
    gathered = GATHERED_LAYERS * decoder.layer_weights * layout.weight if layout.split == 3 else 0.0
    casts = 0.0 if layout.offload == "parameters" else layout.cast * trained
    return Needs(
        weights=layout.weights(trained, frozen),
        states=layout.states(trained),
        gradients=layout.gradients(trained),
        step=layout.step(trained),
        activations=activations(decoder, work) + casts,
        gathered=gathered,
    )


def checkpointed_layers(
    decoder: Decoder, layout: Layout, trained: float, frozen: float, work: Work, room: float
) -> int | None:
    """The fewest layers that have to be recomputed for a training to fit into ``room`` bytes; None: no number
    is enough.
    """
    for count in range(decoder.layers + 1):
        tried = Work(work.tokens, count, work.learns, work.fusion, work.element)
        if needs(decoder, layout, trained, frozen, tried).peak <= room:
            return count
    return None
