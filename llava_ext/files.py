"""Files that are whole or absent: atomic JSON, checksums, forced to the disk."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

CHUNK = 1 << 22


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
    """Forces a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def follow_umask(folder: Path, names: str = "*") -> None:
    """Gives the files below a folder, or those of such names, the mode of any new file there: safetensors writes for the owner alone."""
    probe = folder / f".mode.{os.getpid()}"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob(names):
        if path.is_file() and not path.is_symlink():
            with suppress(OSError):  # a file system without modes
                path.chmod(path.stat().st_mode & 0o111 | mode)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name, flushes, renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any | None:
    """The JSON in ``path``, or None when it is absent or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
