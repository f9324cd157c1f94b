"""Which member of which archive an annotation's image is: prefixes, root folders, fallbacks.

All names of a part are looked up at once in the names of the scan (a hash join in pyarrow).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llava_ext.data.record_view import join_name
from workflow_scripts.config.mixtures import ImageMapping
from workflow_scripts.io import UserError

OK, MISSING = "ok", "missing"
SAMPLE = 2000


@dataclass
class Store:
    """A source's images as its scan found them."""

    source: str
    type: str
    path: Path
    table: pa.Table
    names: pa.Array = field(init=False)
    status: np.ndarray = field(init=False)
    note: np.ndarray | None = field(init=False)
    """What training sees otherwise than viewers show it, by row; None where there is nothing of the kind."""

    def __post_init__(self) -> None:
        self.names = self.table.column("name").combine_chunks()
        self.status = np.array(self.table.column("status").to_pylist() or [], dtype=object)
        notes = self.table.column("note").to_pylist() if "note" in self.table.column_names else []
        self.note = np.array(notes, dtype=object) if any(notes) else None


@dataclass(frozen=True)
class Resolved:
    """A mapping with its root folder found."""

    prefix: str
    source: str
    root: str


@dataclass
class Join:
    """For each image name of a part: mapping and row of the scan's table (-1: none), and its status."""

    mapping: np.ndarray
    row: np.ndarray
    status: np.ndarray
    group: np.ndarray
    """Index of the first mapping of the chain (same prefix) that is in charge; -1 when no prefix fits."""
    resolved: list[Resolved]
    notes: list[str] = field(default_factory=list)


def strip_slash(prefix: str) -> str:
    """Prefixes are whole folders; a slash at the end says nothing more."""
    return prefix.rstrip("/")


def _in_folder(images: pa.ChunkedArray, prefix: str) -> np.ndarray:
    if not prefix:
        return np.ones(len(images), bool)
    mask: np.ndarray = pc.starts_with(images, prefix + "/").to_numpy(zero_copy_only=False).astype(bool)
    return mask


def join_images(images: pa.ChunkedArray, mappings: Sequence[ImageMapping], stores: dict[str, Store]) -> Join:
    """Finds every image. Raises :class:`UserError` when a mapping finds nothing at all, with suggestions."""
    count = len(images)
    join = Join(
        np.full(count, -1, np.int32),
        np.full(count, -1, np.int64),
        np.full(count, MISSING, dtype=object),
        np.full(count, -1, np.int32),
        [Resolved(strip_slash(m.prefix), m.source, "") for m in mappings],
    )
    free = np.ones(count, bool)
    for prefix in sorted({strip_slash(m.prefix) for m in mappings}, key=lambda p: (-len(p), p)):
        chain = [i for i, m in enumerate(mappings) if strip_slash(m.prefix) == prefix]
        mine = np.flatnonzero(free & _in_folder(images, prefix))
        free[mine] = False
        join.group[mine] = chain[0]
        for position, index in enumerate(chain):
            _try_mapping(join, images, mine, index, mappings[index], stores, first=position == 0)
    return join


def _try_mapping(
    join: Join,
    images: pa.ChunkedArray,
    mine: np.ndarray,
    index: int,
    mapping: ImageMapping,
    stores: dict[str, Store],
    first: bool,
) -> None:
    open_ = mine[join.status[mine] != OK]
    if not len(open_):
        return
    store, prefix = stores[mapping.source], strip_slash(mapping.prefix)
    names = images.take(pa.array(open_)).combine_chunks()
    root = find_root(names, prefix, store) if mapping.root == "auto" else mapping.root.strip("/")
    if root is None:
        if first:
            raise UserError(explain_no_match(names, mapping, store))
        return
    join.resolved[index] = Resolved(prefix, mapping.source, root)
    rows = _look_up(_inside(names, prefix, root), store, mapping.any_suffix)
    found = rows >= 0
    if first and not found.any():
        raise UserError(explain_no_match(names, mapping, store))
    better = found & ((join.row[open_] < 0) | (_status_of(store, rows) == OK))
    chosen = open_[better]
    join.row[chosen] = rows[better]
    join.mapping[chosen] = index
    join.status[chosen] = store.status[rows[better]]


def _status_of(store: Store, rows: np.ndarray) -> np.ndarray:
    status = np.full(len(rows), MISSING, dtype=object)
    status[rows >= 0] = store.status[rows[rows >= 0]]
    return status


def _inside(names: pa.Array, prefix: str, root: str) -> pa.Array:
    """Annotation names turned into member names: the root in the place of the prefix."""
    return pa.array([join_name(name, prefix, root) for name in names.to_pylist()], pa.string())


def _look_up(wanted: pa.Array, store: Store, any_suffix: bool) -> np.ndarray:
    """Rows of ``wanted`` in the store, -1 where it is absent. Unicode forms of one name are one name."""
    rows = _index(wanted, store.names)
    if (rows < 0).any() and _has_non_ascii(wanted.filter(pa.array(rows < 0))):
        form = {"form": "NFC"}
        _fill(rows, _index(pc.utf8_normalize(wanted, **form), pc.utf8_normalize(store.names, **form)))
    if any_suffix and (rows < 0).any():
        pattern = {"pattern": r"\.[A-Za-z0-9]{1,5}$", "replacement": ""}
        stems = pc.replace_substring_regex(store.names, **pattern)
        _fill(rows, _index(pc.replace_substring_regex(wanted, **pattern), stems))
    return rows


def _index(wanted: pa.Array, names: pa.Array) -> np.ndarray:
    found: np.ndarray = pc.fill_null(pc.index_in(wanted, value_set=names), -1).to_numpy(zero_copy_only=False)
    return found.astype(np.int64)


def _fill(rows: np.ndarray, other: np.ndarray) -> None:
    rows[rows < 0] = other[rows < 0]


def _has_non_ascii(names: pa.Array) -> bool:
    return not bool(pc.all(pc.string_is_ascii(names)).as_py())


def _spread(names: pa.Array, count: int) -> list[str]:
    """Up to ``count`` names, from all over the list."""
    step = max(1, len(names) // count)
    values: list[str] = names.take(pa.array(range(0, len(names), step))).to_pylist()
    return values[:count]


def find_root(names: pa.Array, prefix: str, store: Store) -> str | None:
    """The folder of the store that takes the prefix's place, by vote of a sample of names; None without a
    vote.
    """
    wanted: dict[str, list[str]] = {}
    for name in _spread(names, SAMPLE):
        rest = join_name(name, prefix, "")
        wanted.setdefault(rest.rsplit("/", 1)[-1], []).append(rest)
    votes: Counter[str] = Counter()
    for member in store.names.to_pylist():
        for rest in wanted.get(member.rsplit("/", 1)[-1], ()):
            if member == rest:
                votes[""] += 1
            elif member.endswith("/" + rest):
                votes[member[: -len(rest) - 1]] += 1
    if not votes:
        return None
    return min(votes, key=lambda root: (-votes[root], len(root), root))


def explain_no_match(names: pa.Array, mapping: ImageMapping, store: Store) -> str:
    """Why a mapping finds none of its images, with what would find them."""
    prefix = strip_slash(mapping.prefix)
    needed = [join_name(name, prefix, "") for name in _spread(names, SAMPLE)]
    members = store.names.to_pylist()
    lines = [
        (
            f"images: none of the {len(names)} images under prefix {mapping.prefix!r} is in source"
            f" {mapping.source} ({store.path}) with root {mapping.root!r}"
        ),
        f"  the annotations need, for example: {', '.join(needed[:3])}",
        f"  the source has, for example: {', '.join(_spread(store.names, 3)) or 'no image at all'}",
    ]
    lines += _suggestions(needed, members, names, store, mapping)
    return "\n".join(lines)


def _suggestions(
    needed: list[str], members: list[str], names: pa.Array, store: Store, mapping: ImageMapping
) -> list[str]:
    if mapping.root != "auto" and (root := find_root(names, strip_slash(mapping.prefix), store)) is not None:
        return [f"  fix: root: {root!r} would find them; or leave root out"]
    for what, key in _KEYS:
        there = {key(member): member for member in members}
        for rest in needed:
            if (member := there.get(key(rest))) is not None:
                return [f"  close, but {what}: {rest} is needed, {member} is there"]
    return [
        f"  fix: check that {mapping.source} is the right source for this prefix, and that it is complete"
    ]


def _file_name(name: str) -> str:
    return name.rsplit("/", 1)[-1]


_KEYS: tuple[tuple[str, Any], ...] = (
    ("in other case", str.casefold),
    ("with another suffix (any_suffix: true takes it)", lambda name: name.rsplit(".", 1)[0]),
    ("in another folder (change the prefix)", _file_name),
    ("in another folder and in other case", lambda name: _file_name(name).casefold()),
    ("with another suffix and folder", lambda name: _file_name(name).rsplit(".", 1)[0]),
)
