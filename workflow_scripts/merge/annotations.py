"""A part's annotation files as columns: a few dozen bytes a record, never the records themselves."""

from __future__ import annotations

import gc
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from llava_ext.data.json_records import JsonRecordsError, RawRecords, iterate_blocks
from llava_ext.data.record_kinds import KINDS, Action, default_actions
from llava_ext.data.record_view import RecordView, count_words, image_names, unsafe_path
from llava_ext.data.records import Finding, Settled, View, ordinary, settle, view_decoder
from workflow_scripts.io import UserError

BATCH = 65536
EXAMPLES = 5
_ALL_BITS = (1 << 64) - 1


@dataclass(frozen=True)
class Malformed:
    """A record that is not usable whatever the images are."""

    file: str
    number: int
    why: str


@dataclass(frozen=True)
class Refused:
    """A record that the policy drops, or stops for, because of a finding."""

    kind: str
    action: Action
    example: dict[str, Any]


@dataclass
class Found:
    """The records with one kind of finding."""

    count: int = 0
    action: Action = "keep"
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Records:
    """The well-formed records of a part in their order, and the names of their images one after the other."""

    files: list[Path]
    file: np.ndarray
    number: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    words: np.ndarray
    id_hash: np.ndarray
    n_images: np.ndarray
    first_image: np.ndarray
    images: pa.ChunkedArray
    mended: np.ndarray
    """Records that are written in another form than the file has them."""
    actions: Mapping[str, Action]
    malformed: list[Malformed] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    found: dict[str, Found] = field(default_factory=dict)
    """By kind of finding, in the register's order."""

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def total(self) -> int:
        """All records of the files."""
        return len(self) + len(self.malformed) + len(self.refused)

    @property
    def record_of_image(self) -> np.ndarray:
        """For each image name, the record that it belongs to."""
        return np.repeat(np.arange(len(self)), self.n_images)

    def where(self, record: int) -> str:
        """File and number of a record, for messages."""
        return f"{self.files[self.file[record]].name}, record {self.number[record]}"


class _Collector:
    def __init__(self, actions: Mapping[str, Action]) -> None:
        self.actions = actions
        self.file, self.number = array("H"), array("I")
        self.offset, self.length, self.words = array("Q"), array("I"), array("i")
        self.id_hash, self.n_images = array("Q"), array("H")
        self.mended = array("B")
        self.names: list[str] = []
        self.chunks: list[pa.Array] = []
        self.malformed: list[Malformed] = []
        self.refused: list[Refused] = []
        self.found: dict[str, Found] = {}

    def note(self, where: str, settled: Settled) -> None:
        """Counts the findings of one record."""
        for finding in settled.findings:
            kind = self.found.setdefault(finding.kind, Found(action=self.actions[finding.kind]))
            kind.count += 1
            if len(kind.examples) < EXAMPLES:
                kind.examples.append(_example(where, settled, finding))

    def add(
        self,
        file: int,
        block: RawRecords,
        rows: Sequence[int],
        records: Sequence[RecordView],
        mended: Sequence[int],
    ) -> None:
        """Takes in the good records of a block; ``rows`` are their places in it, ``mended`` those that are
        changed.
        """
        changed = set(mended)
        self.mended.extend([row in changed for row in rows] if changed else bytes(len(rows)))
        self.file.extend([file] * len(rows))
        self.number.extend([block.number + row for row in rows])
        self.offset.extend([block.offsets[row] for row in rows])
        self.length.extend([len(block.data[row]) for row in rows])
        self.words.extend(map(count_words, records))
        # Python's own hash: only equality within this process counts, and str(id) tells 1 and -1, 1 and True
        # apart.
        self.id_hash.extend([0 if r.id is None else hash(str(r.id)) & _ALL_BITS for r in records])
        names = [image_names(record.image) for record in records]
        self.n_images.extend(map(len, names))
        self.names += chain.from_iterable(names)
        if len(self.names) >= BATCH:
            self.flush()

    def flush(self) -> None:
        self.chunks.append(pa.array(self.names, pa.string()))
        self.names = []

    def finish(self, files: list[Path]) -> Records:
        self.flush()
        n_images = np.array(self.n_images, np.int64)
        first = np.cumsum(n_images) - n_images
        return Records(
            files,
            np.array(self.file, np.uint16),
            np.array(self.number, np.uint32),
            np.array(self.offset, np.uint64),
            np.array(self.length, np.uint32),
            np.array(self.words, np.int32),
            np.array(self.id_hash, np.uint64),
            n_images,
            first,
            pa.chunked_array(self.chunks, pa.string()),
            np.array(self.mended, bool),
            self.actions,
            self.malformed,
            self.refused,
            {kind: self.found[kind] for kind in KINDS if kind in self.found},
        )


def _example(where: str, settled: Settled, finding: Finding) -> dict[str, Any]:
    return {"record": where, "id": settled.record.get("id"), "detail": finding.detail}


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Millions of small objects that are no garbage cost the garbage collector half the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_records(files: list[Path], actions: Mapping[str, Action] | None = None) -> Records:
    """Reads the annotation files of a part; ``actions`` says what is done about each kind of finding.

    Broken records are collected, not raised; broken JSON raises :class:`UserError` with file and record.
    """
    found = _Collector(default_actions() | dict(actions or {}))
    with without_garbage_collection():
        for number, path in enumerate(files):
            try:
                size = path.stat().st_size / 1e6
                print(f"reading {path.name} ({size:.1f} MB)", file=sys.stderr, flush=True)
                for block in iterate_blocks(path):
                    _read_block(found, number, path, block)
            except JsonRecordsError as error:
                raise UserError(f"{error}. Repair the file or fetch it again") from None
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}; run the step that makes it again") from None
    return found.finish(files)


def _read_block(found: _Collector, file: int, path: Path, block: RawRecords) -> None:
    """Checks the records of a block; nearly always all of them are good."""
    rows: list[int] = []
    records: list[RecordView] = []
    mended: list[int] = []
    for row, data in enumerate(block.data):
        record: View | None
        try:
            record = view_decoder.decode(data)
            usual = ordinary(record)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            usual = False
        if not usual:
            record = _look_closely(found, f"{path.name}, record {block.number + row}", row, data, mended)
        if record is not None:
            rows.append(row)
            records.append(record)
    found.add(file, block, rows, records, mended)


def _look_closely(
    found: _Collector, where: str, row: int, data: bytes | memoryview, mended: list[int]
) -> View | None:
    """The record as it will be trained on, with its findings noted; None when it is left out."""
    try:
        settled = settle(msgspec.json.decode(data), found.actions)
        record = msgspec.convert(settled.record, View)
        if not settled.because and (why := _complaint(record)):
            raise msgspec.ValidationError(why)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        name, _, number = where.rpartition(", record ")
        found.malformed.append(Malformed(name, int(number), str(error)))
        return None
    found.note(where, settled)
    if settled.because:
        example = _example(where, settled, next(f for f in settled.findings if f.kind == settled.because))
        found.refused.append(Refused(settled.because, settled.action, example))
        return None
    if settled.action == "fix":
        mended.append(row)
    return record


def _complaint(record: RecordView) -> str:
    image = record.image
    if image is None:
        return ""
    names = [image] if isinstance(image, str) else image
    for name in names:
        if unsafe_path(name):
            return f"image {name[:200]!r} is no path inside a folder"
    return f"{len(names)} images" if len(names) > 65535 else ""


def record_id(records: Records, record: int) -> Any:
    """The ``id`` of one record, read from its file."""
    with records.files[records.file[record]].open("rb") as stream:
        stream.seek(int(records.offset[record]))
        return msgspec.json.decode(stream.read(int(records.length[record]))).get("id")
