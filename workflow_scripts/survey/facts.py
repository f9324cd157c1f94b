"""Rows of a survey as numbers for people: per source and in all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from llava_ext.data.survey import CODES, REASONS

BINS = 32
"""Bars of a histogram of lengths, from 0 to the cut."""
EXAMPLES = 5
"""Records that are named of each source and kind of finding."""

Describe = Callable[[int], dict[str, Any]]


def facts_of(
    rows: np.ndarray, sources: np.ndarray, names: Sequence[str], max_length: int, describe: Describe
) -> dict[str, Any]:
    """All that is said of one layout.

    Args:
        rows: ``(samples,)`` of :data:`llava_ext.data.survey.MEASURED`.
        sources: ``(samples,)``, places in ``names``.
        describe: what names a sample among the examples.
    """
    seen = rows["reason"] != CODES["left_out"]
    parts = {name: np.flatnonzero((sources == place) & seen) for place, name in enumerate(names)}
    return {
        "all": counts(rows[seen]),
        "left_out": int((~seen).sum()),
        "sources": {name: counts(rows[mine]) for name, mine in parts.items() if len(mine)},
        "histogram": histogram(rows[seen], max_length),
        "examples": {
            name: found
            for name, mine in parts.items()
            if (found := dict(_examples(rows[mine], mine, describe)))
        },
    }


def counts(rows: np.ndarray) -> dict[str, Any]:
    """The numbers of some samples."""
    reasons = np.bincount(rows["reason"], minlength=len(REASONS))
    lengths = np.quantile(rows["tokens"], (0.5, 0.95, 1.0)) if len(rows) else np.zeros(3)
    return {
        "samples": len(rows),
        "with_picture": int((rows["pictures"] > 0).sum()),
        "tokens": int(rows["tokens"].sum(dtype=np.int64)),
        "vision": int(rows["vision"].sum(dtype=np.int64)),
        "labels": int(rows["labels"].sum(dtype=np.int64)),
        "unlabelled": {name: int(reasons[code]) for name, code in CODES.items() if code and reasons[code]},
        "cut": int(rows["is_cut"].sum()),
        "picture_cut": int((rows["pictures_cut"] > 0).sum()),
        "length": dict(zip(("median", "p95", "longest"), (int(value) for value in lengths), strict=True)),
    }


def histogram(rows: np.ndarray, max_length: int) -> dict[str, Any]:
    """Samples by length, those with a picture and those without apart; the edges are lower ends and the last
    upper one.
    """
    width = -(-max_length // BINS)
    edges = np.arange(0, max_length + width + 1, width)
    with_picture = rows["pictures"] > 0
    return {
        "edges": edges.tolist(),
        "with_picture": np.histogram(rows["tokens"][with_picture], edges)[0].tolist(),
        "text_only": np.histogram(rows["tokens"][~with_picture], edges)[0].tolist(),
    }


def _examples(
    rows: np.ndarray, indices: np.ndarray, describe: Describe
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    found = {name: rows["reason"] == code for name, code in CODES.items() if code}
    found |= {"cut": rows["is_cut"], "picture_cut": rows["pictures_cut"] > 0}
    for name, mask in found.items():
        if mask.any():
            yield name, [describe(int(index)) for index in indices[np.flatnonzero(mask)[:EXAMPLES]]]
