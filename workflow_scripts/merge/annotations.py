"""A part's annotation files as columns: a few dozen bytes a record, never the records themselves."""

from __future__ import annotations

import gc
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from llava_ext.data.json_records import JsonRecordsError, RawRecords, iterate_blocks
from llava_ext.data.samples import RecordView, count_words, image_names, record_decoder, unsafe_path
from workflow_scripts.io import UserError

BATCH = 65536
_ALL_BITS = (1 << 64) - 1


@dataclass(frozen=True)
class Malformed:
    """A record that is not usable whatever the images are."""

    file: str
    number: int
    why: str


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
    malformed: list[Malformed] = field(default_factory=list)
    placeholder_mismatch: list[str] = field(default_factory=list)
    placeholder_mismatches: int = 0

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def record_of_image(self) -> np.ndarray:
        """For each image name, the record that it belongs to."""
        return np.repeat(np.arange(len(self)), self.n_images)

    def where(self, record: int) -> str:
        """File and number of a record, for messages."""
        return f"{self.files[self.file[record]].name}, record {self.number[record]}"


class _Collector:
    def __init__(self) -> None:
        self.file, self.number = array("H"), array("I")
        self.offset, self.length, self.words = array("Q"), array("I"), array("i")
        self.id_hash, self.n_images = array("Q"), array("H")
        self.names: list[str] = []
        self.chunks: list[pa.Array] = []
        self.malformed: list[Malformed] = []
        self.mismatches: list[str] = []
        self.n_mismatches = 0

    def add(self, file: int, block: RawRecords, rows: Sequence[int], records: Sequence[RecordView]) -> None:
        """Takes in the good records of a block; ``rows`` are their places in it."""
        self.file.extend([file] * len(rows))
        self.number.extend([block.number + row for row in rows])
        self.offset.extend([block.offsets[row] for row in rows])
        self.length.extend([len(block.data[row]) for row in rows])
        self.words.extend(map(count_words, records))
        # Python's own hash: only equality within this process counts, and str(id) tells 1 and -1, 1 and True apart.
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
            self.malformed,
            self.mismatches,
            self.n_mismatches,
        )


@contextmanager
def collector_off() -> Iterator[None]:
    """Millions of small objects that are no garbage cost the garbage collector half the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_records(files: list[Path]) -> Records:
    """Reads the annotation files of a part.

    Broken records are collected, not raised; broken JSON raises :class:`UserError` with file and record.
    """
    found = _Collector()
    with collector_off():
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
    rows, records = [], []
    for row, data in enumerate(block.data):
        try:
            record = record_decoder.decode(data)
            why = _complaint(record)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            why = str(error)
        if why:
            found.malformed.append(Malformed(path.name, block.number + row, why))
            continue
        rows.append(row)
        records.append(record)
        if ("<image>" in record.conversations[0].value) != bool(record.image):
            _compare_placeholders(found, f"{path.name}, record {block.number + row}", record)
    found.add(file, block, rows, records)


def _compare_placeholders(found: _Collector, where: str, record: RecordView) -> None:
    """Counts records with an image but no placeholder in any turn, or the other way round."""
    if record.image and any("<image>" in turn.value for turn in record.conversations):
        return
    found.n_mismatches += 1
    if len(found.mismatches) < 5:
        found.mismatches.append(where)


def _complaint(record: RecordView) -> str:
    if not record.conversations:
        return "conversations is empty"
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
        return record_decoder.decode(stream.read(int(records.length[record]))).id
