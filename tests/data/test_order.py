"""Which samples a step sees, on any number of processes."""

from __future__ import annotations

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from llava_ext.data.sampler import STRATEGIES, EpochSampler

LENGTHS = np.array([(-1) ** (number % 5 == 0) * (number * 37 % 90 + 1) for number in range(96)])


def steps(strategy, world, accumulation, batch=2, epoch=0):
    """For each optimizer step the micro-batches of all ranks, as sorted tuples."""
    sampler = EpochSampler(LENGTHS, strategy, batch, world * accumulation, seed=3)
    sampler.set_epoch(epoch)
    batches = BatchSampler(sampler, batch, drop_last=False)
    ranks = [list(BatchSamplerShard(batches, world, rank)) for rank in range(world)]
    return [
        sorted(
            tuple(ranks[rank][step * accumulation + part])
            for rank in range(world)
            for part in range(accumulation)
        )
        for step in range(len(ranks[0]) // accumulation)
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_numbers_of_processes_see_the_same_steps(strategy):
    alone = steps(strategy, 1, 4)
    assert steps(strategy, 2, 2) == alone == steps(strategy, 4, 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_sample_once_an_epoch(strategy):
    seen = [index for step in steps(strategy, 2, 2) for batch in step for index in batch]
    assert sorted(seen) == list(range(len(LENGTHS)))


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "sequential"])
def test_epochs_differ_and_repeat(strategy):
    assert steps(strategy, 1, 4, epoch=1) != steps(strategy, 1, 4)
    assert steps(strategy, 1, 4, epoch=1) == steps(strategy, 1, 4, epoch=1)


def test_grouped_batches_hold_one_modality():
    grouped = steps("group_by_modality_length", 1, 4)
    mixed = [step for step in grouped if len({LENGTHS[index] > 0 for batch in step for index in batch}) == 2]
    assert len(mixed) <= 1  # what is left over of both
