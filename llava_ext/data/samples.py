"""The samples of a training: records read by offset from a mapped index, images straight from their archives.

Nothing is held in memory but a mapped table of a few bytes a record. Files are opened per process, so that a
store can be handed to forked or spawned dataset workers.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np

try:
    from isal.isal_zlib import crc32
except ImportError:  # four times as slow, the same result
    from zlib import crc32

from .json_records import JsonRecordsError, iterate_records
from .record_kinds import KINDS, Action
from .record_view import count_words, image_names, join_name, record_decoder, unsafe_path
from .records import View, mend, ordinary, settle, view_decoder

RECORD_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u4"),
        ("words", "<i4"),
        ("source", "<u2"),
        ("first_image", "<u4"),
        ("n_images", "<u2"),
    ]
)
IMAGE_DTYPE = np.dtype(
    [
        ("store", "<u2"),
        ("offset", "<u8"),
        ("stored_size", "<u4"),
        ("size", "<u4"),
        ("method", "u1"),
        ("crc32", "<u4"),
        ("tolerant", "u1"),
    ]
)


class SamplesError(ValueError):
    """Data that are not what their index says; the message names the file and the fix."""


class _Files:
    """One descriptor a file and process, opened when first needed."""

    def __init__(self) -> None:
        self._pid = -1
        self._open: dict[str, int] = {}

    def get(self, path: str, flags: int = os.O_RDONLY) -> int:
        if self._pid != os.getpid():
            # Descriptors inherited by a fork stay with the parent; a file position is never shared.
            self._pid, self._open = os.getpid(), {}
        if (fd := self._open.get(path)) is None:
            fd = self._open[path] = os.open(path, flags | os.O_CLOEXEC)
        return fd

    def read(self, path: str, offset: int, size: int) -> bytes:
        fd = self.get(path)
        data = os.pread(fd, size, offset)
        while len(data) < size:
            more = os.pread(fd, size - len(data), offset + len(data))
            if not more:
                raise SamplesError(
                    f"{path}: ends at byte {offset + len(data)}, {offset + size} bytes were expected"
                )
            data += more
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


class SampleStore(ABC):
    """Samples by number; see :func:`open_samples`. Safe to hand to dataset workers."""

    path: Path
    digest: str
    """What the content is; equal for equal samples wherever they lie."""
    lengths: np.ndarray
    """int32 (records,): words of all turns, negative for text-only records."""
    mended: Mapping[str, int] = MappingProxyType({})
    """How many records are read in another form than their file has them, by kind of finding."""

    def __len__(self) -> int:
        return len(self.lengths)

    def record(self, index: int) -> dict[str, Any]:
        """The LLaVA record, as the annotation has it; an empty `image` is left out, so that having the key
        says it all.
        """
        decoded = msgspec.json.decode(self.record_bytes(index))
        assert isinstance(decoded, dict)
        if not decoded.get("image", True):
            del decoded["image"]
        return decoded

    @abstractmethod
    def record_bytes(self, index: int) -> bytes:
        """The record's JSON."""

    @abstractmethod
    def image_bytes(self, index: int) -> list[bytes]:
        """The files of the record's images, in its order. Raises :class:`SamplesError` when one can't be
        had.
        """

    @abstractmethod
    def tolerant(self, index: int) -> list[bool]:
        """For each image, whether a truncated file is to be decoded as far as it goes."""

    @abstractmethod
    def source(self, index: int) -> str:
        """The name of the source that the record's images are from (its annotations' source without one)."""

    @property
    @abstractmethod
    def sources(self) -> list[str]:
        """All names that :meth:`source` can give."""

    @property
    def source_numbers(self) -> np.ndarray:
        """uint16 (records,): the place of each record's source in :attr:`sources`."""
        return np.zeros(len(self), np.uint16)


def open_samples(
    data_path: str | Path, image_folder: str | Path | None = None, tolerant: bool = False
) -> SampleStore:
    """Opens a mixture (its folder, its manifest, or its samples.json), or a plain LLaVA JSON with an image
    folder.

    ``tolerant`` is for plain JSON only: decode truncated images as far as they go.
    Raises :class:`SamplesError` for files that are absent or do not fit together.
    """
    path = Path(data_path)
    if path.is_dir():
        path = path / "samples.json"
    elif path.name == "manifest.json":
        path = path.with_name("samples.json")
    if not path.is_file():
        raise SamplesError(f"{path}: there is no such file; give a LLaVA JSON or a mixture's folder")
    if path.with_name("records.npy").is_file():
        return MixtureStore(path)
    return PlainStore(path, None if image_folder is None else Path(image_folder), tolerant)


@dataclass(frozen=True)
class _Store:
    type: str
    path: str


class MixtureStore(SampleStore):
    """A merged mixture: `samples.json`, `records.npy`, `images.npy` and `manifest.json` side by side."""

    records: np.ndarray
    """The mapped `records.npy`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        folder = path.parent
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SamplesError(
                f"{folder / 'manifest.json'}: {error}; the mixture is not complete, merge again"
            ) from None
        self.digest = manifest["digest"]
        self._sources: list[str] = manifest["sources"]
        self._stores = [_Store(s["type"], os.path.normpath(folder / s["path"])) for s in manifest["stores"]]
        self._mappings: list[tuple[str, str]] = [(m["prefix"], m["root"]) for m in manifest["mappings"]]
        self.records = self._load(folder / "records.npy", RECORD_DTYPE, manifest["records"])
        self._images = self._load(folder / "images.npy", IMAGE_DTYPE, manifest["images"])
        if path.stat().st_size != manifest["samples_bytes"]:
            raise SamplesError(f"{path}: is not of the size that its manifest says; merge again")
        self.lengths = self.records["words"]
        self._files = _Files()

    def __reduce__(self) -> tuple[type[MixtureStore], tuple[Path]]:
        """A spawned worker maps the files itself instead of getting a copy of the tables."""
        return MixtureStore, (self.path,)

    @staticmethod
    def _load(path: Path, dtype: np.dtype[Any], rows: int) -> np.ndarray:
        try:
            table: np.ndarray = np.load(path, mmap_mode="r" if rows else None, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise SamplesError(f"{path}: {error}; the mixture is not complete, merge again") from None
        if table.dtype != dtype or len(table) != rows:
            raise SamplesError(f"{path}: not the table that manifest.json describes; merge again")
        return table

    def record_bytes(self, index: int) -> bytes:
        """The record's JSON, read by offset."""
        row = self.records[index]
        return self._files.read(str(self.path), int(row["offset"]), int(row["length"]))

    def _rows(self, index: int) -> np.ndarray:
        row = self.records[index]
        first = int(row["first_image"])
        return self._images[first : first + int(row["n_images"])]

    def image_bytes(self, index: int) -> list[bytes]:
        """One read an image; its CRC32 is the one that the scan saw."""
        return [self._read(index, place, row) for place, row in enumerate(self._rows(index))]

    def _read(self, index: int, place: int, row: np.void) -> bytes:
        store = self._stores[row["store"]]
        try:
            if store.type == "folder":
                data = self._from_folder(store, index, place, row)
            else:
                data = self._files.read(store.path, int(row["offset"]), int(row["stored_size"]))
                if row["method"] == 8:
                    data = zlib.decompress(data, -15, int(row["size"]))
        except (OSError, zlib.error) as error:
            raise SamplesError(f"{store.path}: {error}") from None
        if crc32(data) != row["crc32"]:
            raise SamplesError(
                f"an image in {store.path} is not what the scan saw; the file was changed"
                " since: scan and merge again"
            )
        return data

    def _from_folder(self, store: _Store, index: int, place: int, row: np.void) -> bytes:
        prefix, root = self._mappings[int(row["offset"])]
        name = image_names(record_decoder.decode(self.record_bytes(index)).image)[place]
        return (Path(store.path) / join_name(name, prefix, root)).read_bytes()

    def count_tolerant(self, rows: np.ndarray) -> int:
        """How many images of these records are damaged and kept."""
        before = np.concatenate(([0], np.cumsum(self._images["tolerant"], dtype=np.int64)))
        first = self.records["first_image"][rows].astype(np.int64)
        return int((before[first + self.records["n_images"][rows]] - before[first]).sum())

    def tolerant(self, index: int) -> list[bool]:
        """True for truncated files that the mixture's policy keeps."""
        return [bool(row["tolerant"]) for row in self._rows(index)]

    def source(self, index: int) -> str:
        """The name of the sample's source."""
        return self._sources[self.records[index]["source"]]

    @property
    def sources(self) -> list[str]:
        """The names of all sources of the mixture."""
        return list(self._sources)

    @property
    def source_numbers(self) -> np.ndarray:
        """As in the index."""
        return np.asarray(self.records["source"])


PLAIN_ACTIONS: dict[str, Action] = {
    name: "fix" if kind.default == "fix" else "keep" if kind.keep else "fail" for name, kind in KINDS.items()
}


class _Refused:
    """Records of a plain JSON that can't be trained on; all are counted, the first few are named."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self.kinds: dict[str, int] = {}
        self.shown: list[str] = []

    def add(self, index: int, identity: Any, kind: str, detail: str) -> None:
        """Notes a record."""
        self.count += 1
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        if len(self.shown) < 5:
            self.shown.append(f"  record {index + 1} (id {identity!r}): {kind}: {KINDS[kind].what}: {detail}")

    def tell(self) -> None:
        """Raises :class:`SamplesError` when there are any."""
        if self.count:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
            raise SamplesError(
                "\n".join([f"{self.path}: {self.count} records can't be trained on ({kinds}):", *self.shown])
                + "\nMend the file, or let the workflow merge it: its policies drop or fix them"
            )


class PlainStore(SampleStore):
    """A plain LLaVA JSON (or JSON lines) and a folder of images, as LLaVA's own scripts take them.

    There is no policy: what can be trained on as it is, is; what only needs another form is read in that
    form; the rest is refused when the file is opened.
    """

    mended: dict[str, int]

    def __init__(self, path: Path, image_folder: Path | None, tolerant: bool) -> None:
        self.path, self._folder, self._tolerant = path, image_folder, tolerant
        self._files = _Files()
        self.mended = {}
        self._changed: set[int] = set()
        offsets, sizes, words = array("Q"), array("L"), array("i")
        sha, refused = hashlib.sha256(), _Refused(path)
        try:
            for raw in iterate_records(path):
                data = self._usable(len(offsets), raw.data, refused)
                offsets.append(raw.offset)
                sizes.append(len(raw.data))
                sha.update(data)
                words.append(0 if refused.count else self._words(raw.number, data))
        except JsonRecordsError as error:
            raise SamplesError(str(error)) from None
        refused.tell()
        self._offsets = np.array(offsets, np.uint64)
        self._sizes = np.array(sizes, np.uint64)
        self.lengths = np.array(words, np.int32)
        self.digest = sha.hexdigest()

    def _usable(self, index: int, data: memoryview | bytes, refused: _Refused) -> memoryview | bytes:
        """The record in the form in which it is trained on; what can't be is noted."""
        try:
            view = view_decoder.decode(data)
            if ordinary(view):
                return data
        except (msgspec.MsgspecError, UnicodeDecodeError):
            pass  # said below, unless it is mended
        try:
            settled = settle(msgspec.json.decode(data), PLAIN_ACTIONS)
            if not settled.because:
                msgspec.convert(settled.record, View)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise SamplesError(f"{self.path}: record {index + 1} is malformed: {error}") from None
        if settled.because:
            found = next(finding for finding in settled.findings if finding.kind == settled.because)
            refused.add(index, settled.record.get("id"), found.kind, found.detail)
            return data
        if settled.action != "fix":
            return data
        for kind in (f.kind for f in settled.findings if PLAIN_ACTIONS[f.kind] == "fix"):
            self.mended[kind] = self.mended.get(kind, 0) + 1
        self._changed.add(index)
        return msgspec.json.encode(settled.record)

    def _words(self, number: int, data: memoryview | bytes) -> int:
        record = record_decoder.decode(data)
        names = image_names(record.image)
        if names and self._folder is None:
            raise SamplesError(f"{self.path}: record {number} has an image, but no image folder was given")
        for name in names:
            if unsafe_path(name):
                raise SamplesError(
                    f"{self.path}: record {number}: image {name!r} leads out of the image folder"
                )
        return count_words(record)

    def record_bytes(self, index: int) -> bytes:
        """The record's JSON, read by offset, in the form in which it is trained on."""
        data = self._files.read(str(self.path), int(self._offsets[index]), int(self._sizes[index]))
        return mend(data, PLAIN_ACTIONS) if index in self._changed else data

    def _names(self, index: int) -> list[str]:
        return image_names(record_decoder.decode(self.record_bytes(index)).image)

    def image_bytes(self, index: int) -> list[bytes]:
        """The image files' bytes."""
        found = []
        for name in self._names(index):
            path = (self._folder or Path()) / name
            try:
                found.append(path.read_bytes())
            except OSError as error:
                raise SamplesError(f"{path}: {error.strerror}") from None
        return found

    def tolerant(self, index: int) -> list[bool]:
        """What was asked for when the store was opened."""
        return [self._tolerant] * len(self._names(index))

    def source(self, index: int) -> str:
        """The JSON's name: a plain file is one source."""
        return self.path.stem

    @property
    def sources(self) -> list[str]:
        """The one source."""
        return [self.path.stem]
