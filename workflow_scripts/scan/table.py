"""The scan itself: what has to be read, reading it in parallel, and the table that comes out.

Results reach the disk every few seconds as *parts* beside the table. The parts of a scan that was killed and
the table of an earlier scan are looked up by what identifies a member's content, so that only the rest is
read.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llava_ext.files import atomic_path
from workflow_scripts.archives import (
    DamagedMember,
    Listing,
    StoreReader,
    StoreType,
    TooLargeMember,
    list_members,
    store_size,
)
from workflow_scripts.io import UserError, progress
from workflow_scripts.scan.image_check import (
    MAX_BYTES,
    MAX_PIXELS,
    NOTES,
    STATUSES,
    Status,
    Verdict,
    check,
    prepare_process,
    wrong_suffix,
)

CHUNK = 64
PART_SECONDS = 10.0
EXAMPLES = 5
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("offset", pa.int64()),
        ("stored_size", pa.int64()),
        ("size", pa.int64()),
        ("method", pa.uint8()),
        ("crc32", pa.uint32()),
        ("format", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("status", pa.string()),
        ("wrong_suffix", pa.bool_()),
        ("detail", pa.string()),
        # What recognises an unchanged member in the next scan; not part of the table's digest.
        ("header", pa.int64()),
        ("listed_crc", pa.int64()),
        ("mtime", pa.int64()),
        # Not part of the digest either: tables of before it was there stay what they are.
        ("note", pa.string()),
    ]
)
CONTRACT = SCHEMA.names[:12]


@dataclass(frozen=True)
class ScanSettings:
    """How to scan: threads, the limit of pixels, whether unchanged members are read again."""

    threads: int = 1
    max_pixels: int = MAX_PIXELS
    full: bool = False


Row = tuple[Any, ...]
"""One row in the order of SCHEMA."""


def scan_store(store: Path, kind: StoreType, table: Path, settings: ScanSettings) -> dict[str, Any]:
    """Scans ``store`` into the parquet file ``table`` and returns the summary for the manifest."""
    prepare_process()
    listing = list_members(store, kind)
    parts = table.with_name(f".{table.name}.parts")
    settings_key = str(settings.max_pixels)
    known = {} if settings.full else _known(table, parts, settings_key)
    rows: list[Row | None] = [None] * len(listing)
    todo = _reuse(listing, known, rows)
    del known
    read_bytes = int(np.asarray(listing.stored)[todo].sum()) if todo else 0
    with StoreReader(store, kind) as reader:
        for row, result in _scan_rows(reader, listing, todo, settings, _Parts(parts, settings_key)):
            rows[row] = result
        _move_shifted(reader, listing, rows)
    written = _write(table, [row for row in rows if row is not None], settings_key)
    shutil.rmtree(parts, ignore_errors=True)
    print(f"read {len(todo)} of {len(listing)} images ({read_bytes / 1e6:.1f} MB)", flush=True)
    return _summary(store, kind, listing, written)


def member_key(listing: Listing, row: int) -> tuple[Any, ...]:
    """What identifies a member's content as far as it can be known without reading it."""
    return (
        listing.names[row],
        int(listing.size[row]),
        int(listing.stored[row]),
        int(listing.method[row]),
        int(listing.crc[row]),
        int(listing.mtime[row]),
    )


def _known(table: Path, parts: Path, settings_key: str) -> dict[tuple[Any, ...], Row]:
    """Rows of the earlier table and of an unfinished scan, by member key."""
    files = [table, *sorted(parts.glob("*.parquet"))] if parts.is_dir() else [table]
    known: dict[tuple[Any, ...], Row] = {}
    for file in files:
        try:
            content = pq.read_table(file)
        except (OSError, pa.ArrowException):
            continue
        if (content.schema.metadata or {}).get(b"scan") != settings_key.encode() or not content.schema.equals(
            SCHEMA
        ):
            continue
        for row in zip(*(column.to_pylist() for column in content.columns), strict=True):
            known[(row[0], row[3], row[2], row[4], row[13], row[14])] = row
    return known


def _reuse(listing: Listing, known: dict[tuple[Any, ...], Row], rows: list[Row | None]) -> list[int]:
    """Fills ``rows`` with what is known; returns the others in the order in which they lie on the disk."""
    todo = []
    for row in range(len(listing)):
        if known and (old := known.get(member_key(listing, row))) is not None:
            rows[row] = old
        else:
            todo.append(row)
    header = np.asarray(listing.header)
    return sorted(todo, key=header.__getitem__) if listing.type != "folder" else todo


def _move_shifted(reader: StoreReader, listing: Listing, rows: list[Row | None]) -> None:
    """A member known from before can lie elsewhere now; its data offset follows from its header."""
    for index, row in enumerate(rows):
        if row is None or row[12] == int(listing.header[index]):
            continue
        try:
            offset = reader.data_start(listing, index)
        except DamagedMember as error:
            rows[index] = _damaged(listing, index, error)
            continue
        rows[index] = (row[0], offset, *row[2:12], int(listing.header[index]), *row[13:])


class _Parts:
    """Saves finished rows every few seconds."""

    def __init__(self, folder: Path, settings_key: str) -> None:
        self.folder, self.key = folder, settings_key
        self.rows: list[Row] = []
        self.last = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self.number = len(list(folder.glob("*.parquet")))

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if time.monotonic() - self.last > PART_SECONDS:
            self.save()

    def save(self) -> None:
        if self.rows:
            _write(self.folder / f"{self.number:06d}.parquet", self.rows, self.key)
            self.rows, self.number = [], self.number + 1
        self.last = time.monotonic()


def _scan_rows(
    reader: StoreReader, listing: Listing, todo: Sequence[int], settings: ScanSettings, parts: _Parts
) -> Iterator[tuple[int, Row]]:
    def work(chunk: Sequence[int]) -> list[Row]:
        return [scan_member(reader, listing, row, settings.max_pixels) for row in chunk]

    def results() -> Iterator[tuple[int, Row]]:
        chunks = (todo[at : at + CHUNK] for at in range(0, len(todo), CHUNK))
        for chunk, rows in _ordered(work, chunks, settings.threads):
            yield from zip(chunk, rows, strict=True)

    try:
        for row, result in progress(results(), len(todo), f"scanning {reader.path.name}"):
            parts.add(result)
            yield row, result
    finally:
        parts.save()


def _ordered(
    work: Any, chunks: Iterable[Sequence[int]], threads: int
) -> Iterator[tuple[Sequence[int], list[Row]]]:
    """Runs ``work`` on a thread pool with a short queue; the decoders release Python's lock."""
    source = iter(chunks)
    with ThreadPoolExecutor(threads) as pool:
        queue: list[tuple[Sequence[int], Future[list[Row]]]] = []
        try:
            queue = [(chunk, pool.submit(work, chunk)) for chunk in islice(source, 4 * threads)]
            while queue:
                chunk, future = queue.pop(0)
                yield chunk, future.result()
                queue += [(chunk, pool.submit(work, chunk)) for chunk in islice(source, 1)]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def scan_member(reader: StoreReader, listing: Listing, row: int, max_pixels: int) -> Row:
    """Reads and judges one image."""
    try:
        piece = reader.read(listing, row, MAX_BYTES)
    except DamagedMember as error:
        return _damaged(listing, row, error)
    verdict = check(piece.data, max_pixels)
    stated = int(listing.crc[row])
    if stated not in (-1, piece.crc):
        # A strict decode can miss a flipped bit; the CRC can't.
        detail = f"CRC32 is {piece.crc:08x}, the archive says {stated:08x}; {verdict.detail}".rstrip("; ")
        verdict = Verdict("corrupt", verdict.format, verdict.width, verdict.height, detail)
    return _row(listing, row, piece.offset, piece.crc, verdict, len(piece.data))


def _damaged(listing: Listing, row: int, error: DamagedMember) -> Row:
    status: Status = "too_large" if isinstance(error, TooLargeMember) else "corrupt"
    return _row(listing, row, -1, 0, Verdict(status, detail=str(error)), int(listing.size[row]))


def _row(listing: Listing, row: int, offset: int, crc: int, verdict: Verdict, size: int) -> Row:
    name = listing.names[row]
    return (
        name,
        offset,
        int(listing.stored[row]),
        size if listing.type == "folder" else int(listing.size[row]),
        int(listing.method[row]),
        crc,
        verdict.format,
        verdict.width,
        verdict.height,
        verdict.status,
        wrong_suffix(name, verdict.format),
        verdict.detail,
        int(listing.header[row]),
        int(listing.crc[row]),
        int(listing.mtime[row]),
        verdict.note,
    )


def _write(path: Path, rows: Sequence[Row], settings_key: str) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    table = pa.table(arrays, schema=SCHEMA.with_metadata({b"scan": settings_key.encode()}))
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return table


def table_digest(table: pa.Table) -> str:
    """sha256 of the contract's columns, independent of how parquet stores them."""
    sha = hashlib.sha256()
    for name in CONTRACT:
        column = table.column(name).combine_chunks()
        if pa.types.is_string(column.type):
            sha.update("\n".join(column.to_pylist()).encode())
        else:
            sha.update(np.ascontiguousarray(column.to_numpy(zero_copy_only=False)).tobytes())
    return sha.hexdigest()


def read_scan(manifest: Path, summary: dict[str, Any]) -> pa.Table:
    """The table of a scan, with the notes where it has them.

    Raises:
        UserError: it is not the one that the manifest describes.
    """
    path = manifest.with_name("images.parquet")
    try:
        there = pq.read_schema(path).names
        table = pq.read_table(path, columns=[name for name in (*CONTRACT, "note") if name in there])
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{path}: can't be read ({error}); delete {manifest} and run the scan again"
        ) from None
    if not set(CONTRACT) <= set(there) or table_digest(table) != summary["table_digest"]:
        raise UserError(
            f"{path}: not the table that {manifest} describes; delete the manifest and scan again"
        )
    return table


def _summary(store: Path, kind: StoreType, listing: Listing, table: pa.Table) -> dict[str, Any]:
    statuses = Counter(table.column("status").to_pylist())
    formats = Counter(table.column("format").to_pylist())
    notes = Counter(table.column("note").to_pylist())
    noted = {name: notes[name] for name in NOTES if notes[name]}
    return {
        "store": {"type": kind, "bytes": store_size(store)},
        "images": table.num_rows,
        "bytes": int(np.asarray(listing.stored).sum()) if len(listing) else 0,
        "counts": {status: statuses[status] for status in STATUSES if statuses[status]},
        "formats": {name or "none": formats[name] for name in sorted(formats)},
        "wrong_suffix": sum(table.column("wrong_suffix").to_pylist()),
        # only when there is something to say: another text makes what follows run again
        **({"seen_otherwise": noted} if noted else {}),
        "others": listing.others,
        "notes": {kind: asdict(note) for kind, note in sorted(listing.notes.items())},
        "examples": _examples(table),
        "table_digest": table_digest(table),
    }


def _examples(table: pa.Table) -> dict[str, list[dict[str, str]]]:
    """The first few of each kind of trouble, by name."""
    import pyarrow.compute as pc

    found: dict[str, list[dict[str, str]]] = {}
    for status in STATUSES[1:]:
        bad = table.filter(pc.equal(table["status"], status)).select(["name", "detail"]).slice(0, EXAMPLES)
        if bad.num_rows:
            found[status] = bad.to_pylist()
    for note in NOTES:
        noted = table.filter(pc.equal(table["note"], note)).select(["name", "detail"]).slice(0, EXAMPLES)
        if noted.num_rows:
            found[note] = noted.to_pylist()
    lying = table.filter(table["wrong_suffix"]).select(["name", "format"]).slice(0, EXAMPLES)
    if lying.num_rows:
        found["wrong_suffix"] = [{"name": row["name"], "detail": row["format"]} for row in lying.to_pylist()]
    return found
