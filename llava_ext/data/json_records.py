"""The records of an annotation file one after the other, with their place in it, in little memory.

An annotation file is a JSON array (LLaVA's own form) or JSON lines. A gigabyte of JSON is never held as
Python objects: a window of the file is cut at the end of a record, and msgspec, which checks the syntax of
every byte, splits it into raw records.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

WINDOW = 32 << 20
LINES = 4096
_SPACE = b" \t\r\n"
_BETWEEN = frozenset(b" \t\r\n,")
_raw_list = msgspec.json.Decoder(list[msgspec.Raw])


class JsonRecordsError(ValueError):
    """An annotation file that can't be split into records; the message names file and record."""


class RawRecord(NamedTuple):
    """One record's bytes and where they begin in the file. ``number`` counts from 1."""

    number: int
    offset: int
    data: memoryview | bytes


class RawRecords(NamedTuple):
    """Some records that follow each other; the first has ``number``."""

    number: int
    offsets: list[int]
    data: Sequence[memoryview | bytes]


def iterate_records(path: Path, window: int = WINDOW) -> Iterator[RawRecord]:
    """Yields a file's records in order; see :func:`iterate_blocks`."""
    for block in iterate_blocks(path, window):
        for place, (offset, data) in enumerate(zip(block.offsets, block.data, strict=True)):
            yield RawRecord(block.number + place, offset, data)


def iterate_blocks(path: Path, window: int = WINDOW) -> Iterator[RawRecords]:
    """Yields a file's records in order, many at a time.

    Raises :class:`JsonRecordsError` for broken syntax, naming the record; the records before it were yielded,
    but for those of the same window.
    """
    with path.open("rb") as stream:
        begin, first = _first_byte(path, stream.fileno())
        if first == b"[":
            yield from _array(path, stream.fileno(), begin + 1, window)
        elif first == b"{":
            yield from _object_or_lines(path, stream.fileno(), begin)
        else:
            raise JsonRecordsError(
                f"{path}: begins with {first!r}; it must be a JSON array of records, or one JSON record a"
                " line"
            )


def _first_byte(path: Path, fd: int) -> tuple[int, bytes]:
    head = os.pread(fd, 4096, 0)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise JsonRecordsError(f"{path}: is UTF-16; save it as UTF-8 (`iconv -f UTF-16 -t UTF-8`)")
    start = 3 if head.startswith(b"\xef\xbb\xbf") else 0
    while start < len(head) and head[start : start + 1] in (b" ", b"\t", b"\r", b"\n"):
        start += 1
    return start, head[start : start + 1]


def _object_or_lines(path: Path, fd: int, begin: int) -> Iterator[RawRecords]:
    """JSON lines; a whole file that is one object is told apart from a line of them."""
    line_end = os.pread(fd, 1 << 16, begin).find(b"\n")
    first = os.pread(fd, line_end if line_end >= 0 else 1 << 16, begin)
    if line_end >= 0 and first.strip() == b"{":
        raise JsonRecordsError(
            f"{path}: is one JSON object, not a list; the records must be an array [...] at the top, or one a"
            " line"
        )
    with os.fdopen(os.dup(fd), "rb", closefd=True) as stream:
        stream.seek(begin)
        offset, number = begin, 1
        found = RawRecords(number, [], [])
        for line in stream:
            stripped = line.strip(_SPACE)
            if stripped:
                _check_line(path, number, stripped)
                found.offsets.append(offset + len(line) - len(line.lstrip(_SPACE)))
                found.data.append(stripped)  # type: ignore[attr-defined]
                number += 1
            offset += len(line)
            if len(found.offsets) == LINES:
                yield found
                found = RawRecords(number, [], [])
        yield found


def _check_line(path: Path, number: int, line: bytes) -> None:
    try:
        msgspec.json.decode(line, type=msgspec.Raw)
    except msgspec.DecodeError as error:
        raise JsonRecordsError(
            f"{path}: record {number} is not valid JSON ({error}): {_excerpt(line)}"
        ) from None


def _array(path: Path, fd: int, begin: int, window: int) -> Iterator[RawRecords]:
    size = os.fstat(fd).st_size
    position, number, mark, length = begin, 1, b"", window
    while True:
        block = _read(fd, position, min(length, size - position))
        last = position + len(block) - 2 >= size
        records, used = _split(block, last, mark)
        if records is None:
            if last:
                raise _locate(path, bytes(block[1:-1]), number - 1, position)
            length *= 2
            continue
        data = [memoryview(raw) for raw in records]
        yield RawRecords(number, _offsets(block, data, position - 1), data)
        if last:
            return
        number += len(data)
        mark = mark or _mark(block)
        position, length = position + used, window


def _read(fd: int, position: int, length: int) -> bytearray:
    """Part of an array's inside, with an opening bracket in front and a free byte behind."""
    block = bytearray(length + 2)
    block[0] = ord("[")
    view, done = memoryview(block)[1:-1], 0
    while done < length:
        count = os.preadv(fd, [view[done:]], position + done)
        if count == 0:  # the file became shorter
            view.release()
            del block[1 + done : -1]
            return block
        done += count
    return block


def _offsets(block: bytearray, data: list[memoryview], shift: int) -> list[int]:
    """Where the records begin: each behind the one before, with only blanks and a comma between."""
    offsets, at = [], 1
    for record in data:
        while block[at] in _BETWEEN:
            at += 1
        offsets.append(shift + at)
        at += len(record)
    return offsets


def _mark(block: bytearray) -> bytes:
    """How records begin in this file, `{"id"` for instance: a good guess of where to cut."""
    start = block.find(b"{")
    colon = block.find(b":", start)
    return bytes(block[start:colon]).rstrip() if 0 <= start < colon else b""


def _split(block: bytearray, last: bool, mark: bytes) -> tuple[list[msgspec.Raw] | None, int]:
    """The records of a block of an array's inside, and how much of the block they take with their comma.

    A prefix that is a list when brackets are put around it can only have been cut between two records.
    """
    if last:
        try:
            return _raw_list.decode(memoryview(block)[:-1]), len(block) - 2
        except msgspec.DecodeError:
            return None, 0
    for comma in _cuts(block, mark):
        block[comma] = ord("]")  # in place: a block is large, and copying it is a third of the work
        try:
            return _raw_list.decode(memoryview(block)[: comma + 1]), comma
        except msgspec.DecodeError:
            block[comma] = ord(",")
    return None, 0


def _cuts(block: bytearray, mark: bytes, attempts: int = 12) -> Iterator[int]:
    """Places of commas that may stand between two records, from the end."""
    mark = mark or _mark(block)
    at = len(block)
    for _ in range(attempts):
        at = block.rfind(mark, 0, at) if mark else -1
        if at <= 0:
            break
        before = bytes(block[max(0, at - 256) : at]).rstrip(_SPACE)
        if before.endswith(b",") and before[:-1].rstrip(_SPACE).endswith(b"}"):
            yield max(0, at - 256) + len(before) - 1
    at = len(block)
    for _ in range(attempts):
        at = block.rfind(b"}", 0, at)
        if at < 0:
            return
        after = at + 1
        while block[after : after + 1] in (b" ", b"\t", b"\r", b"\n"):
            after += 1
        if block[after : after + 1] == b",":
            yield after


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _locate(path: Path, block: bytes, number: int, position: int) -> JsonRecordsError:
    """Says which record is broken, by reading the last stretch again slowly."""
    text = block.decode("utf-8", "surrogateescape")
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    at, why = 0, "the array does not end with ]; the file is cut"
    while at < len(text):
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if text[at : at + 1] == "]":
            why = "there is something behind the end of the array, or a comma too many"
            break
        try:
            _, at = decoder.raw_decode(text, at)
            number += 1
        except ValueError as error:
            if at < len(text):
                why = f"record {number + 1} is not valid JSON ({error})"
            break
    offset = position + len(text[:at].encode("utf-8", "surrogateescape"))
    excerpt = _excerpt(text[at : at + 200].encode("utf-8", "surrogateescape"))
    return JsonRecordsError(
        f"{path}: {why}, at byte {offset}: {excerpt}; {number} records before it are whole"
    )


def _excerpt(data: bytes, length: int = 80) -> str:
    text = data[:length].decode("utf-8", "replace")
    return repr(text + ("..." if len(data) > length else ""))
