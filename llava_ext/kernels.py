"""How a training step is computed: attention, fusion, recomputation. All of it is rounding, none of it is
result.

Plain standard library, so that the configuration and the command line share names and refusals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

ATTENTIONS = ("sdpa", "varlen", "eager", "flash_attention_2")
# Those that compute a packed row sample by sample, and no pair of tokens of two samples.
SEGMENTED = ("varlen", "flash_attention_2")
FUSIONS = ("none", "compile", "liger")
LAYERS = ("all", "none", "auto")
# Engines that gather a layer's weights by hooks in the middle of what would be compiled.
GATHERING = ("zero3", "fsdp")


@dataclass(frozen=True)
class Kernels:
    """The chosen kernels.

    Attributes:
        attention: one of :data:`ATTENTIONS`.
        fusion: one of :data:`FUSIONS`.
        checkpoint_layers: one of :data:`LAYERS`, or a number N: every Nth decoder layer.
    """

    attention: str = "sdpa"
    fusion: str = "none"
    checkpoint_layers: str | int = "none"

    def problems(self, *, gpu: bool, half: bool, engine: str) -> Iterator[tuple[str, str]]:
        """What can't be, as (name, sentence), before anything is loaded.

        Args:
            gpu: whether a GPU computes.
            half: whether it computes in bf16 or fp16.
            engine: `none`, `ddp`, `zero2`, `zero3` or `fsdp`.
        """
        if self.attention == "flash_attention_2" and not gpu:
            yield "attention", "flash_attention_2 needs a CUDA GPU; choose varlen or sdpa"
        elif self.attention == "flash_attention_2" and not half:
            yield "attention", "flash_attention_2 needs bf16 or fp16; choose sdpa for float32"
        if self.fusion == "liger" and not gpu:
            yield "fusion", "liger has kernels for GPUs only; choose none or compile"
        if self.fusion == "compile" and engine in GATHERING:
            yield (
                "fusion",
                f"compile does not go together with {engine}, which gathers each layer's weights while it is"
                " computed; choose liger or none, or split less (ddp, zero2)",
            )


def layer_interval(value: str | int) -> int | None:
    """Of how many decoder layers one is recomputed: 1 for `all`, 0 for `none`, N; None for `auto`.

    Raises:
        ValueError: anything else, with what is allowed.
    """
    known = {"all": 1, "none": 0, "auto": None}
    if value in known:
        return known[str(value)]
    if str(value).isdecimal() and int(value) >= 1:
        return int(value)
    raise ValueError(f"found {value!r}; allowed: {', '.join(LAYERS)}, or a number N from 1 (every Nth layer)")


def recomputed_layers(value: str | int, layers: int) -> int:
    """How many of so many decoder layers are recomputed: of every N the first; the most that `auto` may
    take.
    """
    interval = 1 if value == "auto" else layer_interval(value)
    return -(-layers // interval) if interval else 0
