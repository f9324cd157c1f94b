"""Sample counts and weights: which records, and how often, by seed."""

from __future__ import annotations

import hashlib

import numpy as np


def wanted_count(available: int, samples: int | None, weight: float | None) -> int:
    """How many records are to come out of ``available``."""
    if samples is not None:
        return samples if available else 0
    return available if weight is None else round(weight * available)


def choose(records: np.ndarray, count: int, seed: int, label: str) -> np.ndarray:
    """``count`` of ``records``, sorted; each as often as whole rounds go, the rest by rank of a hash.

    The rank depends only on seed, label and record, so that a larger count keeps every record of a smaller
    one, and no library's random generator can change the choice.
    """
    if not len(records):
        return records
    rounds, rest = divmod(count, len(records))
    parts = [records] * rounds
    if rest:
        ranks = [
            hashlib.blake2b(f"{seed}:{label}:{record}".encode(), digest_size=8).digest()
            for record in records.tolist()
        ]
        order = np.argsort(np.array(ranks, "S8"), kind="stable")
        parts.append(records[order[:rest]])
    return np.sort(np.concatenate(parts)) if parts else records[:0]
