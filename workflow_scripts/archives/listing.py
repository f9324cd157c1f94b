"""Which kind of store a path is, and its list of images."""

from __future__ import annotations

import hashlib
from pathlib import Path

from workflow_scripts.archives.folders import list_folder
from workflow_scripts.archives.members import Listing, Note, StoreType
from workflow_scripts.archives.tars import list_tar
from workflow_scripts.archives.zips import list_zip
from workflow_scripts.io import UserError

__all__ = ["Listing", "Note", "StoreType", "detect_type", "list_members", "listing_identity", "store_size"]

COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip -k"),
    b"BZh": ("bzip2", "bunzip2 -k"),
    b"\xfd7zXZ": ("xz", "unxz -k"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"7z\xbc\xaf": ("7z", "7z x"),
    b"Rar!": ("rar", "unrar x"),
}


def detect_type(path: Path) -> StoreType:
    """Tells a folder, a zip and a tar apart by content. Raises :class:`UserError` for anything else."""
    if path.is_dir():
        return "folder"
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder; check the path in the source's config")
    with path.open("rb") as stream:
        head = stream.read(1024)
    for magic, (kind, tool) in COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(
                f"{path}: a {kind}-compressed archive can't be read by offset; unpack it once with `{tool}`"
                " and name the result (a tar, or a folder) instead"
            )
    if head[:4] in (b"PK\3\4", b"PK\5\6", b"PK\6\6") or path.suffix.lower() == ".zip":
        return "zip"
    if head[257:262] == b"ustar" or path.suffix.lower() == ".tar":
        return "tar"
    if _ends_like_a_zip(path):
        return "zip"
    raise UserError(f"{path}: neither a folder, a zip nor a tar (it begins with {head[:16]!r})")


def _ends_like_a_zip(path: Path) -> bool:
    """Self-extracting zips have a program in front."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        stream.seek(max(0, size - 65557))
        return b"PK\5\6" in stream.read()


def list_members(path: Path, kind: StoreType | None = None) -> Listing:
    """The images of a store, without reading any of them."""
    match kind or detect_type(path):
        case "zip":
            return list_zip(path)
        case "tar":
            return list_tar(path)
        case _:
            return list_folder(path)


def listing_identity(listing: Listing, times: bool) -> str:
    """Hash of names, sizes and CRCs (and times, where there is no CRC)."""
    sha = hashlib.sha256("\n".join(listing.names).encode())
    columns = ("size", "stored", "method", "crc") + (("mtime",) if times else ())
    for column in columns:
        sha.update(getattr(listing, column).tobytes())
    return sha.hexdigest()


def store_size(path: Path) -> int:
    """Bytes of an archive; -1 for a folder."""
    return -1 if path.is_dir() else path.stat().st_size
