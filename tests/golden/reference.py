"""Reading a folder of golden vectors: recordings of the original LLaVA 1.5 code and of the authors' published
code.

Nothing here knows a size, a name or a tokenizer: everything is read from the folder's own files.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DATA = Path(__file__).parent / "data"
DIFFERENCES: pytest.StashKey[dict[str, tuple[float, float]]] = pytest.StashKey()


def folder(config: pytest.Config) -> Path:
    """The folder that this run compares with: ``--reference``, or the small copy beside the tests."""
    chosen = config.getoption("--reference", default=None)
    return Path(chosen).resolve() if chosen else DATA


@cache
def read(path: Path) -> Any:
    """A JSON file of the folder."""
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file of the folder; never pickled objects."""
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def recordings(root: Path) -> list[dict[str, Any]]:
    """Every recorded forward pass: the entry of the index with ``which`` (van or fork) and ``flags`` of
    its configuration.
    """
    found = []
    for index in sorted((root / "model").glob("index_*.json")):
        which, content = index.stem.removeprefix("index_"), read(index)
        found += [{"which": which, "configs": content["configs"], **entry} for entry in content["recordings"]]
    return found


def largest(ours: Any, theirs: Any) -> float:
    """The largest absolute difference; infinite for different shapes, 0 for empty arrays or NaN in the
    same places.
    """
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours.shape != theirs.shape or (np.isnan(ours) != np.isnan(theirs)).any():
        return float("inf")
    return float(np.nanmax(np.abs(ours - theirs))) if (~np.isnan(theirs)).any() else 0.0
