"""What a survey counted is what training asks for: all samples checked, the largest micro-batch named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llava_ext import statistics
from llava_ext.data.dataset import EncodedSamples
from llava_ext.data.samples import open_samples
from llava_ext.data.survey import MEASURED, Surveyor
from llava_ext.errors import TrainingError
from llava_ext.training.token_lengths import counts_by_source, largest_micro_batch, read_token_lengths
from tests.data.test_survey import surveyor
from tests.support.trainings import GOLDEN, losses
from tests.training.test_train import ok, short, stopped

STORE = ("train/stage2.json", "images")


def measured(path: Path, **options) -> tuple[Surveyor, np.ndarray]:
    """The table of the recorded stage 2, also written to ``path``."""
    looking = surveyor(open_samples(*(GOLDEN / name for name in STORE)), layouts=[{}], **options)
    rows = looking.measure(range(len(looking.store))).rows[0]
    np.save(path, rows)
    return looking, rows


def test_a_training_takes_the_same_steps_and_names_its_largest_micro_batch(tmp_path, train_here):
    looking, counted = measured(tmp_path / "lengths.npy")
    ok(train_here(short(2, tmp_path / "plain")))
    flags = {"token_lengths": tmp_path / "lengths.npy"}
    text = ok(train_here(short(2, tmp_path / "surveyed", **flags)))
    assert losses(tmp_path / "surveyed") == losses(tmp_path / "plain")
    total = len(looking.store)
    assert f"{total} samples; of {total} looked at" in text
    assert f"{counted['tokens'].sum()} tokens in an epoch; the largest micro-batch of the first one" in text
    flags |= {"supervised_share_bound": 0.9}
    stopped(train_here(short(2, tmp_path / "bound", **flags)), "carry a label", "--supervised_share_bound")


def test_the_counts_are_those_of_every_sample(tmp_path):
    looking, counted = measured(tmp_path / "lengths.npy")
    samples = EncodedSamples(looking.store, looking._samples.tokenizer, "v1", 2048, lambda *_: None)
    [mine] = counts_by_source(counted, samples).values()
    [theirs] = statistics.survey(samples, range(len(samples))).values()
    placeholders = int(counted["pictures"].sum())  # which encoding counts as one token of text each
    assert vars(mine) == vars(theirs) | {"tokens": theirs.tokens - placeholders}


@pytest.mark.parametrize(
    ("lengths", "size", "packed", "place", "tokens"),
    [
        ([5, 1, 4, 4, 3], 2, False, 0, 10),  # filled up to the longest
        ([5, 1, 4, 4, 3], 2, True, 1, 8),
        ([1, 1, 9], 2, False, 1, 9),  # a last one with fewer samples
        ([2, 2, 2, 2], 2, True, 0, 4),
    ],
)
def test_the_largest_micro_batch(lengths, size, packed, place, tokens):
    rows = np.zeros(len(lengths), MEASURED)
    rows["tokens"] = lengths[::-1]
    order = list(range(len(lengths)))[::-1]
    found = largest_micro_batch(rows, order, size, packed)
    assert (found.place, found.tokens) == (place, tokens)
    assert found.samples == order[place * size : (place + 1) * size]


def test_a_table_of_other_data_is_refused(tmp_path):
    np.save(tmp_path / "short.npy", np.zeros(3, MEASURED))
    np.save(tmp_path / "other.npy", np.zeros(4, np.int32))
    for name, said in (("short", "found 3 rows"), ("other", "have 4 samples"), ("absent", "No such file")):
        with pytest.raises(TrainingError, match=rf"--token_lengths .*{name}\.npy: .*{said}"):
            read_token_lengths(str(tmp_path / f"{name}.npy"), 4)
