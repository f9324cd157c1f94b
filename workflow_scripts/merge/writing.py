"""Writes `samples.json` and its index. Equal inputs give equal bytes."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from llava_ext.data.records import mend
from llava_ext.data.samples import IMAGE_DTYPE, RECORD_DTYPE
from llava_ext.files import atomic_path, sha256
from workflow_scripts.merge.annotations import Records

BLOCK = 16 << 20


def one_line(record: bytes) -> bytes:
    """A record without line breaks between its parts (inside of strings JSON has none)."""
    if b"\n" in record or b"\r" in record:
        return msgspec.json.format(record, indent=0)
    return record


def _record_blocks(records: Records, chosen: np.ndarray) -> Iterator[list[bytes]]:
    """The chosen records' bytes, read a stretch of the file at a time: they mostly follow each other."""
    for number, path in enumerate(records.files):
        mine = chosen[records.file[chosen] == number]
        mended = records.mended[mine]
        begin = records.offset[mine].astype(np.int64)
        end = begin + records.length[mine]
        with path.open("rb") as stream:
            at = 0
            while at < len(mine):
                # All records that end within a block from here on; at least one.
                upto = max(at + 1, int(np.searchsorted(end, begin[at] + BLOCK, "right")))
                first = int(begin[at])
                stream.seek(first)
                block = stream.read(int(end[upto - 1]) - first)
                places = zip((begin[at:upto] - first).tolist(), (end[at:upto] - first).tolist(), strict=True)
                found = [block[start:stop] for start, stop in places]
                if b"\n" in block or b"\r" in block:
                    found = [one_line(data) for data in found]
                for row in np.flatnonzero(mended[at:upto]).tolist():
                    found[row] = mend(found[row], records.actions)
                yield found
                at = upto


class SamplesWriter:
    """Writes the JSON array, one record a line, and remembers where each begins."""

    def __init__(self, stream: BinaryIO, total: int) -> None:
        self.stream, self.total = stream, total
        self.sha = hashlib.sha256()
        self.position = self.done = 0
        self.offset = np.zeros(total, np.uint64)
        self.length = np.zeros(total, np.uint32)
        self._put(b"[\n")

    def _put(self, data: bytes) -> None:
        self.sha.update(data)
        self.stream.write(data)
        self.position += len(data)

    def write(self, records: Records, chosen: np.ndarray) -> None:
        """Writes the chosen records of a part, in their order."""
        for block in progress_of_blocks(_record_blocks(records, chosen), len(chosen)):
            lengths = np.fromiter(map(len, block), np.int64, len(block))
            start = self.position + (2 if self.done else 0)
            rows = slice(self.done, self.done + len(block))
            self.offset[rows] = start + np.concatenate(([0], np.cumsum(lengths[:-1] + 2)))
            self.length[rows] = lengths
            self._put((b",\n" if self.done else b"") + b",\n".join(block))
            self.done += len(block)

    def finish(self) -> str:
        """Ends the array; returns the file's sha256."""
        self._put(b"\n]\n")
        self.stream.flush()
        return self.sha.hexdigest()


def progress_of_blocks(blocks: Iterator[list[bytes]], total: int) -> Iterator[list[bytes]]:
    """Passes blocks on and shows how many records they were."""
    done = 0
    start = last = time.monotonic()
    for block in blocks:
        yield block
        done += len(block)
        if time.monotonic() - last > 5:
            last = time.monotonic()
            print(f"writing samples: {done} of {total}", file=sys.stderr, flush=True)
    print(f"writing samples: {done} done in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def write_array(path: Path, array: np.ndarray) -> str:
    """Saves a .npy file, whole or not at all; returns its sha256."""
    with atomic_path(path) as temporary:
        with temporary.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
        return sha256(temporary)


def empty_records(count: int) -> np.ndarray:
    """The table of `records.npy`."""
    return np.zeros(count, RECORD_DTYPE)


def empty_images(count: int) -> np.ndarray:
    """The table of `images.npy`."""
    return np.zeros(count, IMAGE_DTYPE)


def content_digest(samples_sha: str, images: np.ndarray) -> str:
    """What the mixture teaches: records, and the images' bytes (by size and CRC), wherever they are
    stored.
    """
    sha = hashlib.sha256(samples_sha.encode())
    for column in ("size", "crc32", "tolerant"):
        sha.update(np.ascontiguousarray(images[column]).tobytes())
    return sha.hexdigest()
