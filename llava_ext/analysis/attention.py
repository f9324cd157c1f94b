"""What one query of an attention layer looks at, recomputed from the layer's input.

Layers keep no attention with fast kernels, and all of it would not fit: here one row a head is computed, that
of the query asked for, from the same projections, norms and rotary tables that the layer uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

Tables = tuple[Tensor, Tensor]
"""cos and sin, (batch or 1, tokens, channels of a head)."""


@dataclass(frozen=True)
class Groups:
    """What the tokens of a batch are; (batch, tokens) booleans, and (batch,) places.

    Attributes:
        real: no padding.
        vision: vision tokens.
        text: text behind the first vision token. What stands before it (the start token, the system prompt,
            the name of the first role) is the same for every question and draws attention whatever is asked;
            it is in neither group.
        last: the prompt's last token, from which the first word of the answer is made.
    """

    real: Tensor
    vision: Tensor
    text: Tensor
    last: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], image_token_id: int) -> Groups:
        """Of a batch of prompts, padded on either side. Raises ValueError for a prompt without a picture, or
        without text behind it.
        """
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        vision = (ids == image_token_id) & real
        text = real & ~vision & (vision.cumsum(1) > 0)
        if not bool((vision.any(1) & text.any(1)).all()):
            raise ValueError("diagnostics: each prompt needs a picture and text behind it; found one without")
        places = torch.arange(ids.shape[1], device=ids.device)
        return cls(real, vision, text, (places * real).argmax(1))


@dataclass(frozen=True)
class Looked:
    """Logits before the softmax, (batch, heads, tokens): as they are, and with the vision keys alone turned
    by one position more. Keys that the query does not see have minus infinity.
    """

    logits: Tensor
    turned: Tensor


def one_position(rotary: Any, device: torch.device) -> Tables:
    """cos and sin that turn a key by one position, (1, 1, channels), without the scaling of long contexts."""
    place = torch.ones(1, 1, dtype=torch.long, device=device)
    # `forward` itself: hooks that give vision tokens places on a grid must not see this.
    cos, sin = rotary.forward(torch.zeros((), device=device), place)
    scale = getattr(rotary, "attention_scaling", 1.0)
    return cos / scale, sin / scale


def look(attention: Any, hidden: Tensor, tables: Tables, groups: Groups, step: Tables) -> Looked:
    """What the last token of each prompt looks at in a layer.

    Args:
        attention: the layer's attention module, of the Llama kind.
        hidden: its input (batch, tokens, hidden), behind the layer's norm.
        tables: the rotary tables that the layer gets, in one or two dimensions.
        step: :func:`one_position`.

    Raises:
        ValueError: attention of another kind, or a window shorter than the prompts.
    """
    check_attention(attention, hidden.shape[1])
    rows = torch.arange(len(hidden), device=hidden.device)
    query = _heads(attention, "q", hidden[rows, groups.last][:, None])
    keys = _heads(attention, "k", hidden)
    cos, sin = (table.to(keys.dtype).expand(len(hidden), -1, -1) for table in tables)
    query = _rotated(query, (cos[rows, groups.last][:, None], sin[rows, groups.last][:, None]))
    keys = _rotated(keys, (cos, sin))
    moved = _rotated(keys, (step[0].to(keys.dtype), step[1].to(keys.dtype)))
    turned = torch.where(groups.vision[:, None, :, None], moved, keys)
    return Looked(*(_logits(attention, query, item, groups.real) for item in (keys, turned)))


def check_attention(attention: Any, tokens: int) -> None:
    """Raises ValueError where :func:`look` would compute something else than the layer does."""
    if not all(hasattr(attention, name) for name in ("q_proj", "k_proj", "head_dim", "scaling")):
        raise ValueError(
            f"diagnostics: {type(attention).__name__} has no q_proj and k_proj of its own; attention of the"
            " kind of Llama, Mistral, Qwen 2 and 3 can be looked at"
        )
    window = getattr(attention.config, "sliding_window", None)
    if window is not None and window < tokens:
        raise ValueError(
            f"diagnostics: the layers see {window} tokens back, and a prompt has {tokens}; ask shorter"
            " questions"
        )


def _heads(attention: Any, which: str, hidden: Tensor) -> Tensor:
    """Queries or keys, (batch, heads, tokens, channels), in float32 or better."""
    projected = getattr(attention, f"{which}_proj")(hidden)
    heads = projected.view(*hidden.shape[:-1], -1, attention.head_dim)
    norm = getattr(attention, f"{which}_norm", None)
    heads = (heads if norm is None else norm(heads)).transpose(1, 2)
    return heads.to(torch.promote_types(heads.dtype, torch.float32))


def _rotated(heads: Tensor, tables: Tables) -> Tensor:
    cos, sin = (table[:, None] for table in tables)
    return heads * cos + rotate_half(heads) * sin


def _logits(attention: Any, query: Tensor, keys: Tensor, real: Tensor) -> Tensor:
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    found = (query @ keys.transpose(2, 3)).squeeze(2) * attention.scaling
    return found.masked_fill(~real[:, None], -torch.inf)
