"""The order in which samples are seen: LLaVA's grouping by modality and length, as a function of (seed,
epoch).

Lengths carry the modality in their sign, as LLaVA's ``modality_lengths`` do: positive with an image, negative
for text only. A *megabatch* is what all ranks together consume in one optimizer step; grouping never moves a
sample out of its megabatch, so a run that continues on another number of ranks, with the same micro-batch and
the same global batch, sees the same samples in each step.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

STRATEGIES = ("random", "sequential", "group_by_length", "group_by_modality_length")


def split_to_even_chunks(indices: Sequence[int], lengths: np.ndarray, num_chunks: int) -> list[list[int]]:
    """Splits one sorted megabatch over ``num_chunks`` micro-batches so that their total lengths are close.

    Each sample goes to the chunk with the smallest total that still has room (the first of equals); a
    megabatch that is not divisible is dealt out like cards.
    """
    if len(indices) % num_chunks != 0:
        return [list(indices[start::num_chunks]) for start in range(num_chunks)]
    room = len(indices) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals = [(0, chunk) for chunk in range(num_chunks)]
    for index in indices:
        total, chunk = totals[0]
        chunks[chunk].append(index)
        if len(chunks[chunk]) == room:
            heapq.heappop(totals)
        else:
            heapq.heapreplace(totals, (total + int(lengths[index]), chunk))
    return chunks


def length_grouped_order(
    lengths: np.ndarray, batch_size: int, world_size: int, generator: torch.Generator | None
) -> list[int]:
    """Shuffles, cuts into megabatches, sorts each by length (longest first) and deals it to the
    micro-batches.

    Args:
        lengths: integers of shape ``(samples,)``; negative ones are compared as they are.
        batch_size: samples of a micro-batch.
        world_size: micro-batches of an optimizer step (ranks times gradient accumulation).
        generator: source of the shuffle; ``None`` is torch's global one.

    Returns:
        all sample indices, in training order.
    """
    shuffled = torch.randperm(len(lengths), generator=generator).numpy()
    size = world_size * batch_size
    order: list[int] = []
    for start in range(0, len(shuffled), size):
        mega = shuffled[start : start + size]
        mega = mega[np.argsort(-lengths[mega], kind="stable")]
        for chunk in split_to_even_chunks(mega.tolist(), lengths, world_size):
            order.extend(chunk)
    return order


def modality_grouped_order(
    lengths: np.ndarray,
    batch_size: int,
    world_size: int,
    outer: torch.Generator | None,
    inner: torch.Generator | None = None,
) -> list[int]:
    """LLaVA's ``group_by_modality_length``: megabatches hold samples of one modality only, in random order.

    What is left over of both modalities is merged, in index order, into the last batch. ``inner`` shuffles
    the samples of each modality (LLaVA always uses the global generator for that), ``outer`` the megabatches.

    Raises:
        ValueError: a sample has length zero, so its modality is unknown.
    """
    if (lengths == 0).any():
        raise ValueError("lengths: zero-length samples have no sign to tell their modality; drop them")
    if (lengths > 0).all() or (lengths < 0).all():
        return length_grouped_order(lengths, batch_size, world_size, outer)
    size = world_size * batch_size
    megabatches: list[list[int]] = []
    rest: list[int] = []
    for sign in (1, -1):
        members = np.flatnonzero(lengths * sign > 0)
        inside = length_grouped_order(lengths[members] * sign, batch_size, world_size, inner)
        order = members[inside].tolist()
        pieces = [order[start : start + size] for start in range(0, len(order), size)]
        megabatches += pieces[:-1]
        rest += pieces[-1]
    shuffle = torch.randperm(len(megabatches), generator=outer).tolist()
    return [index for mega in shuffle for index in megabatches[mega]] + sorted(rest)


class EpochSampler(Sampler[int]):
    """One of :data:`STRATEGIES` whose order depends on nothing but the seed and the epoch.

    Torch's global generator is neither read nor moved, so a resumed run sees the same order. Call
    :meth:`set_epoch` before iterating.
    """

    def __init__(
        self, lengths: np.ndarray, strategy: str, batch_size: int, world_size: int, seed: int
    ) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"sampling: {strategy!r} is not one of {', '.join(STRATEGIES)}")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.strategy = strategy
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order())

    def order(self) -> list[int]:
        """All sample indices in the order of the current epoch."""
        if self.strategy == "sequential":
            return list(range(len(self.lengths)))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.strategy == "random":
            return torch.randperm(len(self.lengths), generator=generator).tolist()
        if self.strategy == "group_by_length":
            return length_grouped_order(np.abs(self.lengths), self.batch_size, self.world_size, generator)
        return modality_grouped_order(self.lengths, self.batch_size, self.world_size, generator, generator)
