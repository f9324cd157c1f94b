"""Whether a file whose hash nobody knows is at all what it is used as: an archive, a list of records."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from msgspec import MsgspecError

from llava_ext.data.json_records import JsonRecordsError, iterate_blocks
from llava_ext.data.record_view import record_decoder
from workflow_scripts.io import UserError

_HTML = re.compile(rb"\s*(<!doctype\s+html|<html|<head)", re.IGNORECASE)


def is_web_page(head: bytes, name: str) -> bool:
    """True for a login or error page in the place of a file."""
    return _HTML.match(head[:512]) is not None and not name.endswith((".html", ".htm"))


def objection(path: Path, role: str, suffix: str = "") -> str | None:
    """Why the file can't have this role: it is empty, cut, or a server's error in the form of a file.

    ``suffix`` is that of its name to be: tables of questions are told by it.
    """
    if path.stat().st_size == 0 and role != "other":
        return "is empty"
    if role == "images":
        return _no_archive(path)
    if role != "annotations":
        return None
    return TABLES.get(suffix, _no_records)(path)


def _no_archive(path: Path) -> str | None:
    from workflow_scripts.archives import detect_type, list_members

    try:
        list_members(path, detect_type(path))
    except UserError as error:
        return f"is no whole archive ({str(error).removeprefix(f'{path}: ')})"
    return None


def _no_records(path: Path) -> str | None:
    count, only = 0, b""
    try:
        for block in iterate_blocks(path):
            count += len(block.data)
            only = only or bytes(block.data[0]) if block.data else only
        if count == 1:  # a server's error may be JSON too
            record_decoder.decode(only)
    except JsonRecordsError as error:
        return f"is no whole list of records ({str(error).removeprefix(f'{path}: ')})"
    except MsgspecError as error:
        return f"holds one JSON object that is no record ({error})"
    return None if count else "holds no record"


def _no_parquet(path: Path) -> str | None:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        rows = ParquetFile(path).metadata.num_rows
    except (ArrowException, OSError) as error:
        return f"is no whole parquet file ({str(error).splitlines()[0]})"
    return None if rows else "holds no record"


def _no_csv(path: Path) -> str | None:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        try:
            first = next(csv.DictReader(stream), None)
        except (UnicodeDecodeError, csv.Error) as error:
            return f"is no CSV file ({error})"
    return None if first else "holds no record"


TABLES: Mapping[str, Callable[[Path], str | None]] = {".parquet": _no_parquet, ".csv": _no_csv}
"""Tables of questions, for evaluations; what trains is JSON."""
