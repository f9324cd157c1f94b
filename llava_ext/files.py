"""Files that are whole or absent: atomic writes, checksums, forced to the disk."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHUNK = 1 << 22
LEFTOVER_S = 3600.0
"""A temporary file that nobody on this machine writes and that has not changed for so long is left over."""


def crc32(path: Path) -> str:
    """CRC-32 of a file as eight hex digits, with the fast implementation where it is installed."""
    try:
        from isal.isal_zlib import crc32 as update
    except ImportError:
        update = zlib.crc32
    value = 0
    with path.open("rb") as stream:
        while piece := stream.read(CHUNK):
            value = update(piece, value)
    return f"{value:08x}"


def sha256(path: Path) -> str:
    """sha256 of a file as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Forces a file to the disk, or a folder's names: a rename in it then survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def follow_umask(folder: Path, names: str = "*") -> None:
    """Gives the files below a folder, or those of such names, the mode of any new file there: safetensors
    writes for the owner alone.
    """
    probe = folder / f".mode.{os.getpid()}"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob(names):
        if path.is_file() and not path.is_symlink():
            with suppress(OSError):  # a file system without modes
                path.chmod(path.stat().st_mode & 0o111 | mode)


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
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
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


def write_json(path: Path, value: Any, ensure_ascii: bool = True) -> None:
    """Writes JSON: indented, sorted, newline at the end, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=ensure_ascii) + "\n")


def read_json(path: Path) -> Any | None:
    """The JSON in ``path``, or None when it is absent or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
