"""The order of samples: every recorded run of LLaVA's length-grouped sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llava_ext.data.sampler import (
    EpochSampler,
    length_grouped_order,
    modality_grouped_order,
    split_to_even_chunks,
)

from . import reference


@pytest.fixture
def recorded(root):
    return reference.read(root / "sampler" / "sampler.json")


def cases(recorded):
    for run in recorded["runs"]:
        yield (
            run,
            np.array(recorded["lengths"][run["lengths"]]),
            run["batch_size"],
            run["world_size"],
            run["seed"],
        )


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_orders_from_the_global_generator(recorded):
    for run, lengths, batch, world, seed in cases(recorded):
        torch.manual_seed(seed)
        assert modality_grouped_order(lengths, batch, world, None) == run["generator_none"]
        torch.manual_seed(seed)
        assert length_grouped_order(abs(lengths), batch, world, None) == run["no_modality_generator_none"]


def test_orders_from_a_given_generator(recorded):
    """The published sampler shuffles the megabatches with it, and the samples with the global one all the
    same.
    """
    for run, lengths, batch, world, seed in cases(recorded):
        torch.manual_seed(seed + 1)
        assert modality_grouped_order(lengths, batch, world, seeded(seed + 2)) == run["generator_given"]
        torch.manual_seed(seed + 1)
        assert (
            length_grouped_order(abs(lengths), batch, world, seeded(seed + 2))
            == run["no_modality_generator_given"]
        )


def test_training_uses_the_recorded_order_without_touching_the_global_generator(recorded):
    for run, lengths, batch, world, seed in cases(recorded):
        before = torch.get_rng_state()
        sampler = EpochSampler(lengths, "group_by_modality_length", batch, world, seed)
        assert list(sampler) == run["generator_none"]
        assert (
            list(EpochSampler(lengths, "group_by_length", batch, world, seed))
            == run["no_modality_generator_none"]
        )
        assert torch.equal(torch.get_rng_state(), before)


def test_splitting_a_megabatch(recorded):
    for case in recorded["split_to_even_chunks"]:
        lengths = np.array(case["lengths"])
        assert split_to_even_chunks(case["indices"], lengths, case["num_chunks"]) == case["result"]


def test_batches_of_each_rank(recorded):
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    key = next(name for name in recorded if name.startswith("accelerate_shards"))
    _, rest = key.removeprefix("accelerate_shards_").rsplit("_world", 1)[0], key.rsplit("_world", 1)[1]
    name = key.removeprefix("accelerate_shards_").rsplit("_world", 1)[0]
    world, seed = (int(part) for part in rest.split("_seed"))
    run = next(
        r for r in recorded["runs"] if (r["lengths"], r["world_size"], r["seed"]) == (name, world, seed)
    )
    sampler = EpochSampler(
        np.array(recorded["lengths"][name]), "group_by_modality_length", run["batch_size"], world, seed
    )
    batches = BatchSampler(sampler, run["batch_size"], drop_last=False)
    for rank, expected in recorded[key].items():
        assert list(BatchSamplerShard(batches, world, int(rank))) == expected


def test_zero_lengths_are_refused(recorded):
    with pytest.raises(ValueError, match="zero"):
        modality_grouped_order(np.array([3, 0, -2]), 1, 1, None)
