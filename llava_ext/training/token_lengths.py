"""What a survey has counted of each sample (``--token_lengths``), asked before the first step.

The order of the samples is not decided here: LLaVA groups by words, and so does this training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.survey import CODES, MEASURED
from ..errors import TrainingError
from ..statistics import EXAMPLES, Counts

if TYPE_CHECKING:
    from ..data.dataset import EncodedSamples

MASKED = (CODES["mismatch"], CODES["end_in_text"])


def read_token_lengths(path: str, samples: int) -> np.ndarray:
    """The table, ``(samples,)`` of :data:`llava_ext.data.survey.MEASURED`, mapped.

    Raises:
        TrainingError: it is no such table, or one of other data.
    """
    try:
        rows: np.ndarray = np.load(Path(path), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"--token_lengths {path}: {error}; make the survey again, or leave it out"
        ) from None
    if rows.dtype != MEASURED or rows.shape != (samples,):
        raise TrainingError(
            f"--token_lengths {path}: found {len(rows)} rows of {rows.dtype.names}; the data have {samples}"
            f" samples, and a survey's table has {MEASURED.names}. Make the survey again, or leave it out"
        )
    return rows


def counts_by_source(rows: np.ndarray, samples: EncodedSamples) -> dict[str, Counts]:
    """All samples, as :func:`llava_ext.statistics.survey` counts some; tokens are those of text."""
    found: dict[str, Counts] = {}
    numbers = samples.store.source_numbers
    seen = rows["reason"] != CODES["left_out"]
    for place, name in enumerate(samples.store.sources):
        mine = np.flatnonzero((numbers == place) & seen)
        part = rows[mine]
        masked = np.isin(part["reason"], MASKED)
        if len(mine):
            found[name] = Counts(
                samples=len(mine),
                with_image=int((part["pictures"] > 0).sum()),
                tokens=int((part["tokens"].astype(np.int64) - part["vision"]).sum()),
                supervised=int(part["labels"].sum(dtype=np.int64)),
                mismatches=int(masked.sum()),
                unsupervised=int((part["reason"] > 0).sum()),
                examples=[samples.describe(int(index)) for index in mine[masked][:EXAMPLES]],
            )
    return found


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch of an epoch: its place in it, its samples, and the tokens that are computed."""

    place: int
    samples: Sequence[int]
    tokens: int


def largest_micro_batch(rows: np.ndarray, order: Sequence[int], batch_size: int, packed: bool) -> MicroBatch:
    """Of the micro-batches in this order; without packing, rows are filled up to the longest.

    Args:
        order: the samples of an epoch.
        packed: samples stand in one row, without filling.
    """
    lengths = np.asarray(rows["tokens"], np.int64)[np.asarray(order)]
    count = -(-len(lengths) // batch_size)
    padded = np.zeros(count * batch_size, np.int64)
    padded[: len(lengths)] = lengths
    table = padded.reshape(count, batch_size)
    tokens = table.sum(1) if packed else table.max(1) * (table > 0).sum(1)
    place = int(tokens.argmax())
    chosen = order[place * batch_size : (place + 1) * batch_size]
    return MicroBatch(place, list(chosen), int(tokens[place]))
