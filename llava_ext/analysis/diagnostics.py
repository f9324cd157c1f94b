"""The measurements of "Beyond Semantics": how long vision and text tokens are, and what happens when
vision tokens are shuffled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@contextmanager
def permuted_vision_tokens(
    model: Any, seed: int | None = None, order: Sequence[int] | None = None
) -> Iterator[None]:
    """While it lasts, each image's vision tokens reach the LLM in another order.

    What an image shows is still all there, where it is shown is not: a model that reads positions gets worse,
    one that treats an image as a bag of tokens does not.

    Args:
        seed: one random order for all images; the same seed gives the same order on every machine.
        order: an explicit order instead: token i of the permuted image is token ``order[i]``. With neither,
            nothing changes.

    Raises:
        ValueError: both are given, ``order`` is no permutation of the image's tokens, or the model is none of
            ours.
    """
    if seed is not None and order is not None:
        raise ValueError("permuted_vision_tokens: give a seed or an order, not both")
    core = next((module for module in model.modules() if hasattr(module, "vision_token_hook")), None)
    if core is None:
        raise ValueError(
            f"permuted_vision_tokens: {type(model).__name__} has no vision tokens; load it with"
            " llava_ext.checkpoints.stored.load_model"
        )
    before = core.vision_token_hook

    def permute(tokens: Tensor) -> Tensor:
        count = tokens.shape[1]
        chosen = _random_order(count, seed) if seed is not None else torch.tensor(order)
        if sorted(chosen.tolist()) != list(range(count)):
            raise ValueError(
                f"permuted_vision_tokens: the order has {len(chosen)} entries; a permutation of {count} is"
                " expected"
            )
        return tokens[:, chosen.to(tokens.device)]

    if seed is not None or order is not None:
        core.vision_token_hook = permute
    try:
        yield
    finally:
        core.vision_token_hook = before


def _random_order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class TokenNorms:
    """Mean Euclidean norms per layer, the LLM's input first: two lists of layers + 1 numbers.

    Attributes:
        vision, text: mean norm of vision tokens and of text tokens (interleaved coordinates are text).
        vision_std, text_std: their standard deviations over tokens.
        vision_tokens, text_tokens: how many tokens were seen.
    """

    vision: list[float]
    text: list[float]
    vision_std: list[float]
    text_std: list[float]
    vision_tokens: int
    text_tokens: int

    @property
    def ratio(self) -> list[float]:
        """Vision norm over text norm, per layer; the paper's point is how far the first of them is from 1."""
        return [vision / text for vision, text in zip(self.vision, self.text, strict=True)]


@torch.no_grad()
def token_norms(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> TokenNorms:
    """Norms of vision and text tokens at the LLM's input and after each of its layers.

    Args:
        batches: batches of the collator; padding is left out. At least one must have an image and text.

    Raises:
        ValueError: no vision or no text token in any batch.
    """
    was_training = model.training
    model.eval()
    collected: dict[bool, list[Tensor]] = {True: [], False: []}
    try:
        for batch in batches:
            norms, is_image, real = _layer_norms(model, batch)
            for kind, chosen in ((True, is_image & real), (False, ~is_image & real)):
                collected[kind].append(norms[:, chosen])
    finally:
        model.train(was_training)
    vision, text = (torch.cat(collected[kind], dim=1) for kind in (True, False))
    if not vision.shape[1] or not text.shape[1]:
        raise ValueError(
            "token_norms: the batches hold no vision tokens or no text tokens; pass samples with an image"
        )
    return TokenNorms(
        vision=vision.mean(1).tolist(),
        text=text.mean(1).tolist(),
        vision_std=vision.std(1, correction=0).tolist(),
        text_std=text.std(1, correction=0).tolist(),
        vision_tokens=vision.shape[1],
        text_tokens=text.shape[1],
    )


def _layer_norms(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Norms (layers + 1, batch, tokens), and which tokens are vision and which are no padding."""
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    output = model(**inputs, output_hidden_states=True, use_cache=False)
    norms = torch.stack([state.float().norm(dim=-1).double().cpu() for state in output.hidden_states])
    is_image = (batch["input_ids"] == model.config.image_token_id).cpu()
    mask = batch.get("attention_mask")
    real = torch.ones_like(is_image) if mask is None else mask.bool().cpu()
    return norms, is_image, real
