"""Attention by segments: in a row of packed samples each attends to itself only, and no pair of tokens of two
samples is computed.

Registered with transformers under the name :data:`VARLEN`. On a GPU in half precision it is torch's own
variable-length attention; elsewhere the same mathematics, one segment after the other.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch import library as operators
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import TrainingError
from .language_models import LANGUAGE_MODELS, known_language_models
from .modeling_spatial_llava import VARLEN

# torch 2.10 and 2.11 say is_causal, later ones a window.
PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters)


def segment_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within segments, as transformers calls it.

    Args:
        query, key, value: (batch, heads, tokens, head_dim); keys and values may have fewer heads.
        cu_seq_lens_q: (segments + 1,), int32: where each segment begins in the flattened batch, and its end.
        max_length_q: tokens of the longest segment.

    Returns:
        (batch, tokens, heads, head_dim), and None for the weights.

    Raises:
        ValueError: dropout, a mask, or no segments: none of them would be honoured.
    """
    if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None or dropout:
        raise ValueError(
            "attention varlen needs segments, and knows neither masks nor dropout; use attention sdpa"
        )
    batch, _, tokens, width = query.shape
    if torch.is_autocast_enabled(query.device.type):
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(half), key.to(half), value.to(half)
    window = sliding_window or 0
    on_gpu = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    if not on_gpu:
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    q, k, v = (item.transpose(1, 2).reshape(batch * tokens, -1, width) for item in (query, key, value))
    if on_gpu:
        found = _on_gpu(q, k, v, cu_seq_lens_q, max_length_q, scaling, window)
    else:
        found = attend_segments(q, k, v, cu_seq_lens_q, scaling, window)
    return found.view(batch, tokens, -1, width), None


def _on_gpu(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float, window: int
) -> Tensor:
    """(tokens, heads, head_dim), by torch's kernel."""
    if "window_size" in PARAMETERS:
        causal: dict[str, Any] = {"window_size": (window - 1 if window else -1, 0)}
    elif window and longest > window:
        raise ValueError(f"attention varlen: torch {torch.__version__} knows no sliding window; use sdpa")
    else:
        causal = {"is_causal": True}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in PARAMETERS:
            causal["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    if "scale" in PARAMETERS:
        causal["scale"] = scale
    elif scale != query.shape[-1] ** -0.5:
        raise ValueError(f"attention varlen: torch {torch.__version__} takes no scale of its own; use sdpa")
    found: Any = varlen_attn(query, key, value, starts, starts, longest, longest, **causal)
    return found


# One operator, so that a compiled layer holds it whole: it reads the segments' places.


@operators.custom_op("llava_ext::attend_segments", mutates_args=())
def attend_segments(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float, window: int
) -> Tensor:
    """(tokens, heads, head_dim) each, causal within the segments that begin at ``starts``; ``window`` 0:
    unlimited.
    """
    found = torch.empty_like(query)
    for place in _segments(starts):
        q, k, v = (tensor[place].transpose(0, 1) for tensor in (query, key, value))
        mask = _band(q.shape[1], window, q.device) if window and q.shape[1] > window else None
        piece = scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=scale
        )
        found[place] = piece[0].transpose(0, 1)
    return found


@operators.custom_op("llava_ext::attend_segments_backward", mutates_args=())
def attend_segments_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value. The weights are computed again, in float32."""
    found = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
    for place in _segments(starts):
        g, q, k, v = (tensor[place].transpose(0, 1).float() for tensor in (gradient, query, key, value))
        hidden = ~_band(q.shape[1], window, q.device)
        weights = (q @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        of_weights = g @ v.mT
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
        pieces = (of_scores @ k, of_scores.mT @ q, weights.mT @ g)
        for whole, piece in zip(found, pieces, strict=True):
            whole[place] = piece.transpose(0, 1)
    return found[0], found[1], found[2]


def _segments(starts: Tensor) -> Iterator[slice]:
    return (slice(*ends) for ends in itertools.pairwise(starts.tolist()))


def _band(tokens: int, window: int, device: torch.device) -> Tensor:
    """(tokens, tokens): True where a token is seen, itself and the ``window - 1`` before it (0: all)."""
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - window) if window else seen


@attend_segments.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float, window: int) -> Tensor:
    return torch.empty_like(query)


@attend_segments_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.numbers = inputs[4:]


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *attend_segments_backward(gradient, *ctx.saved_tensors, *ctx.numbers), None, None, None


attend_segments.register_autograd(_differentiate, setup_context=_remember)

# Without a mask function of that name transformers makes no mask and looks for no packed rows.
ALL_ATTENTION_FUNCTIONS.register(VARLEN, segment_attention)


def while_loading(name: str | None) -> str | None:
    """What transformers is told: the vision tower has no segments, and the language model gets them later."""
    return "sdpa" if name == VARLEN else name


def check_family(model_type: str | None) -> None:
    """Refuses :data:`VARLEN` for a language model that may want of its attention what no register says."""
    if model_type not in LANGUAGE_MODELS:
        raise TrainingError(
            f"--attention varlen: not known to be right for {model_type} models; known are"
            f" {known_language_models()}; use --attention sdpa"
        )


def attend_by_segments(language: Any) -> None:
    """Gives a loaded language model the attention :data:`VARLEN`."""
    check_family(language.config.model_type)
    if getattr(language.config, "attention_dropout", 0):
        raise TrainingError(
            f"--attention varlen: this language model has attention_dropout"
            f" {language.config.attention_dropout}, which varlen does not know; use --attention sdpa"
        )
    language.set_attn_implementation(VARLEN)
