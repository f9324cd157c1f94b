"""Writes `samples.json` and its index. Equal inputs give equal bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from llava_ext.samples import IMAGE_DTYPE, RECORD_DTYPE
from workflow_scripts.io import atomic_path, progress
from workflow_scripts.mixture.annotations import Records

BLOCK = 16 << 20


class _Window:
    """Reads records that mostly follow each other, a block at a time."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.begin, self.block = stream, 0, b""

    def get(self, offset: int, length: int) -> bytes:
        at = offset - self.begin
        if at < 0 or at + length > len(self.block):
            self.stream.seek(offset)
            self.begin, at = offset, 0
            self.block = self.stream.read(max(length, BLOCK))
        return self.block[at : at + length]


def one_line(record: bytes) -> bytes:
    """A record without line breaks between its parts (inside of strings JSON has none)."""
    if b"\n" in record or b"\r" in record:
        return msgspec.json.format(record, indent=0)
    return record


def _record_bytes(records: Records, chosen: np.ndarray) -> Iterator[bytes]:
    window, current, stream = None, -1, None
    try:
        for row in chosen.tolist():
            if (file := int(records.file[row])) != current:
                if stream is not None:
                    stream.close()
                stream, current = records.files[file].open("rb"), file
                window = _Window(stream)
            assert window is not None
            yield one_line(window.get(int(records.offset[row]), int(records.length[row])))
    finally:
        if stream is not None:
            stream.close()


class SamplesWriter:
    """Writes the JSON array, one record a line, and remembers where each begins."""

    def __init__(self, stream: BinaryIO, total: int) -> None:
        self.stream, self.total = stream, total
        self.sha = hashlib.sha256()
        self.position = self.done = 0
        self.offset = np.zeros(total, np.uint64)
        self.length = np.zeros(total, np.uint32)
        self.pending: list[bytes] = []
        self.pending_bytes = 0
        self._put(b"[\n")

    def _put(self, data: bytes) -> None:
        self.pending.append(data)
        self.pending_bytes += len(data)
        self.position += len(data)
        if self.pending_bytes > BLOCK:
            self._flush()

    def _flush(self) -> None:
        block = b"".join(self.pending)
        self.sha.update(block)
        self.stream.write(block)
        self.pending, self.pending_bytes = [], 0

    def write(self, records: Records, chosen: np.ndarray) -> None:
        """Writes the chosen records of a part."""
        for data in progress(_record_bytes(records, chosen), len(chosen), "writing samples"):
            start = self.position + 2 * bool(self.done)
            self.offset[self.done], self.length[self.done] = start, len(data)
            self._put(b",\n" + data if self.done else data)
            self.done += 1

    def finish(self) -> str:
        """Ends the array; returns the file's sha256."""
        self._put(b"\n]\n")
        self._flush()
        self.stream.flush()
        return self.sha.hexdigest()


def write_array(path: Path, array: np.ndarray) -> str:
    """Saves a .npy file, whole or not at all; returns its sha256."""
    from workflow_scripts.io import file_sha256

    with atomic_path(path) as temporary:
        with temporary.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
        return file_sha256(temporary)


def empty_records(count: int) -> np.ndarray:
    """The table of `records.npy`."""
    return np.zeros(count, RECORD_DTYPE)


def empty_images(count: int) -> np.ndarray:
    """The table of `images.npy`."""
    return np.zeros(count, IMAGE_DTYPE)


def content_digest(samples_sha: str, images: np.ndarray) -> str:
    """What the mixture teaches: records, and the images' bytes (by size and CRC), wherever they are stored."""
    sha = hashlib.sha256(samples_sha.encode())
    for column in ("size", "crc32", "tolerant"):
        sha.update(np.ascontiguousarray(images[column]).tobytes())
    return sha.hexdigest()


def report_number(value: Any) -> Any:
    """numpy's numbers as Python's, for JSON."""
    return value.item() if isinstance(value, np.generic) else value
