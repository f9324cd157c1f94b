"""The measures of "Beyond Semantics" (arXiv 2503.17349) on a checkpoint's own prompts, in one stream.

* `norm_vision`, `norm_text`: mean Euclidean norm of a token at the LLM's input (layer 0) and after each
  layer.
* `cmb`, Cross-Modality Balance: of a head's attention to vision and text tokens, the share that goes to
  vision. 1 is a head that looks at the picture alone. The system prompt is left out.
* `entropy`: of a head's attention among the vision tokens, as a share of the largest possible: 1 looks
  everywhere alike, 0 at one token. Nothing where there is one vision token.
* `rope_logit`, `rope_attention`, the RoPE sensitivity probe: the vision keys alone are turned by one position
  more, queries and text stay. How far the logits of vision tokens go (their mean, weighted by the attention
  that the tokens had), and how far the attention to vision goes; absolute values, averaged over prompts.
* `permuted_logit`, `permuted_token`: with the vision tokens in a random order, how far the next token's
  logits go on the mean, and how often another token is the first. Layers before the last are read through
  the LLM's final norm and head.

Attention is that of the prompt's last token, from which the answer's first word is made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .attention import Groups, Looked, look, one_position

BY_HEAD = ("cmb", "entropy", "rope_logit", "rope_attention")
BY_LAYER = ("norm_vision", "norm_text", "permuted_logit", "permuted_token")

Batch = Mapping[str, Tensor]
Permuted = Callable[[int], AbstractContextManager[None]]
"""From the number of a batch to a context in which the model gets vision tokens in another order."""


@dataclass(frozen=True)
class Measurement:
    """The mean of ``count`` values. ``layer`` 0 is the LLM's input; ``head`` is None for whole layers."""

    layer: int
    head: int | None
    measure: str
    value: float
    count: int


class Means:
    """Sums and counts by measure and layer, one for each head or one for the layer."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, int], Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self.counts: dict[tuple[str, int], int] = defaultdict(int)

    def add(self, measure: str, layer: int, values: Tensor) -> None:
        """``values`` is (values,) or (values, heads)."""
        self.sums[measure, layer] = self.sums[measure, layer] + values.double().sum(0).cpu()
        self.counts[measure, layer] += len(values)

    def rows(self) -> list[Measurement]:
        """All means, by measure, layer and head."""
        found = []
        for (measure, layer), total in sorted(self.sums.items()):
            count = self.counts[measure, layer]
            heads: list[int | None] = list(range(len(total))) if total.dim() else [None]
            values = (total / count).reshape(-1).tolist()
            found += [
                Measurement(layer, head, measure, value, count)
                for head, value in zip(heads, values, strict=True)
            ]
        return found


@torch.no_grad()
def measure(
    model: Any, batches: Iterable[Batch], permuted: Permuted, layers: Collection[int] | None = None
) -> list[Measurement]:
    """Means over all prompts of ``batches``; what is kept does not grow with their number.

    Args:
        batches: prompts with a picture each, as the model takes them, on its device.
        layers: whose heads are looked at, from 1; None for all.

    Raises:
        ValueError: see :meth:`Groups.of` and :func:`look`; a layer that the model does not have; no batch.
    """
    depth = len(model.model.language_model.layers)
    chosen = set(range(1, depth + 1) if layers is None else layers)
    if unknown := sorted(chosen - set(range(1, depth + 1))):
        raise ValueError(f"layers: found {unknown}; the language model has layers 1 to {depth}")
    means, was_training = Means(), model.training
    model.eval()
    try:
        for number, batch in enumerate(batches):
            groups = Groups.of(batch, model.config.image_token_id)
            ends = _watched(model, batch, groups, chosen, means)
            with permuted(number):
                moved = _watched(model, batch, groups, set(), None)
            _compare_ends(model, ends, moved, means)
    finally:
        model.train(was_training)
    if not means.sums:
        raise ValueError("diagnostics: there is no prompt to look at")
    return means.rows()


def _watched(
    model: Any, batch: Batch, groups: Groups, chosen: Collection[int], means: Means | None
) -> list[Tensor]:
    """One forward pass: adds norms and attention to ``means``, returns the last token's state (batch, hidden)
    at the LLM's input and after each layer.
    """
    language = model.model.language_model
    ends: list[Tensor] = []
    step = one_position(language.rotary_emb, groups.last.device)
    rows = torch.arange(len(groups.last), device=groups.last.device)

    def state(hidden: Tensor) -> None:
        if means is not None:
            _add_norms(means, len(ends), hidden, groups)
        ends.append(hidden[rows, groups.last])

    def attention(layer: int, module: Any, args: Any, given: Mapping[str, Any]) -> None:
        hidden = args[0] if args else given["hidden_states"]
        seen = look(module, hidden, given["position_embeddings"], groups, step)
        if means is not None:
            _add_attention(means, layer, seen, groups)

    def entry(module: Any, args: Any, given: Mapping[str, Any]) -> None:
        state(args[0] if args else given["hidden_states"])

    def leaving(module: Any, args: Any, output: Any) -> None:
        state(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        first = language.layers[0]
        hooks.callback(first.register_forward_pre_hook(entry, with_kwargs=True).remove)
        for number, layer in enumerate(language.layers, start=1):
            hooks.callback(layer.register_forward_hook(leaving).remove)
            if number in chosen:
                looking = partial(attention, number)
                hooks.callback(layer.self_attn.register_forward_pre_hook(looking, with_kwargs=True).remove)
        model.model(**batch, use_cache=False)
    return ends


def _add_norms(means: Means, layer: int, hidden: Tensor, groups: Groups) -> None:
    norms = torch.linalg.vector_norm(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), dim=-1)
    means.add("norm_vision", layer, norms[groups.vision])
    means.add("norm_text", layer, norms[groups.text])


def _add_attention(means: Means, layer: int, seen: Looked, groups: Groups) -> None:
    before, after = seen.logits.softmax(-1), seen.turned.softmax(-1)
    vision = before * groups.vision[:, None]
    to_vision, to_text = vision.sum(-1), (before * groups.text[:, None]).sum(-1)
    means.add("cmb", layer, to_vision / (to_vision + to_text))
    shares = vision / to_vision[..., None]
    tokens = groups.vision.sum(1)
    if bool((tokens > 1).all()):
        means.add("entropy", layer, -torch.xlogy(shares, shares).sum(-1) / tokens.log()[:, None])
    change = torch.where(groups.vision[:, None], seen.turned - seen.logits, 0.0)
    means.add("rope_logit", layer, (shares * change).sum(-1).abs())
    means.add("rope_attention", layer, ((after * groups.vision[:, None]).sum(-1) - to_vision).abs())


def _compare_ends(model: Any, ends: list[Tensor], moved: list[Tensor], means: Means) -> None:
    """The next token's logits, read at each layer, with and without the vision tokens in their order."""
    norm = model.model.language_model.norm
    for layer, (one, other) in enumerate(zip(ends, moved, strict=True)):
        before, after = (model.lm_head(norm(item)) for item in (one, other))
        before, after = (item.to(torch.promote_types(item.dtype, torch.float32)) for item in (before, after))
        means.add("permuted_logit", layer, (after - before).abs().mean(-1))
        means.add("permuted_token", layer, (after.argmax(-1) != before.argmax(-1)).double())
