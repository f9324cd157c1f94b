"""What happens when vision tokens are shuffled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
