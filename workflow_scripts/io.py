"""Files that are either whole or absent: atomic writes, digests, manifests, progress.

A *manifest* is a small JSON file written last, after everything that it describes is complete and verified.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from workflow_scripts.secrets import redact

T = TypeVar("T")
CHUNK = 1 << 20
LEFTOVER_S = 3600.0
"""A temporary file that nobody on this machine writes and that has not changed for so long is left over."""


class UserError(Exception):
    """A mistake that its reader can mend: the message says what, where, what is allowed and the fix."""


def canonical_json(value: Any) -> str:
    """One spelling per value: sorted keys, no spaces, so that equal values have equal digests."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any, length: int = 64) -> str:
    """The first ``length`` hex digits of the sha256 of ``value``'s canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def file_sha256(path: Path) -> str:
    """The sha256 of a file, read in 1 MiB pieces."""
    sha = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(CHUNK):
            sha.update(piece)
    return sha.hexdigest()


def fsync_directory(path: Path) -> None:
    """Makes a rename in ``path`` survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside ``path``; what is written there gets the real name only on success.

    A failure leaves the old file untouched and removes the temporary one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
        fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Deletes temporary files of ``path`` whose writers were killed."""
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = old.name.split(".")[-2]
        with suppress(OSError):  # another process may clean too; another machine may be writing
            if pid.isdecimal() and not _lives(int(pid)) and time.time() - old.stat().st_mtime > LEFTOVER_S:
                old.unlink()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path``, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a manifest: indented, sorted, newline at the end, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON and, when it is damaged or absent, says which file and what to do."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: the file does not exist; run the step that makes it first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); delete it and run the step that makes it again"
        ) from None


def progress(items: Iterable[T], total: int | None, what: str, every_s: float = 10.0) -> Iterator[T]:
    """Passes ``items`` on, showing a tqdm bar on a terminal and a plain line now and then elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=what, dynamic_ncols=True)
        return
    start = last = time.monotonic()
    done = 0
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= every_s:
            last = now
            share = f" of {total} ({100 * done / total:.0f} %)" if total else ""
            print(f"{what}: {done}{share}, {done / (now - start):.0f}/s", file=sys.stderr, flush=True)
    print(f"{what}: {done} done in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a :class:`UserError` into one message on stderr and exit status 1, without a traceback."""
    try:
        yield
    except UserError as error:
        print(redact(f"error: {error}"), file=sys.stderr, flush=True)
        raise SystemExit(1) from None
