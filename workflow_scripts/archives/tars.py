"""The members of a tar, found by walking its headers with the standard library."""

from __future__ import annotations

import posixpath
import tarfile
from pathlib import Path

import numpy as np

from workflow_scripts.archives.members import NO_CRC, STORED, Listing, accept, drop_duplicates, safe_name
from workflow_scripts.io import UserError

BLOCK = 512


def _cut(path: Path, why: str, complete: int) -> UserError:
    return UserError(
        f"{path}: {why}; {complete} members before that are complete. The tar is cut or damaged, most often"
        " by a download that broke off: delete it and fetch it again"
    )


class _Walk:
    """Collects a tar's members; hard links point to the data of the member that they name."""

    def __init__(self, path: Path) -> None:
        self.path, self.total = path, path.stat().st_size
        self.listing = Listing("tar")
        self.rows: list[tuple[int, int, int]] = []
        self.data: dict[str, tuple[int, int, int]] = {}
        self.members = 0

    def add(self, info: tarfile.TarInfo) -> None:
        self.members += 1
        if info.isdir():
            return
        if info.islnk():
            self._hard_link(info)
        elif info.issparse():
            self.listing.note("sparse_file", info.name)
        elif info.isreg():
            if info.offset_data + info.size > self.total:
                missing = info.offset_data + info.size - self.total
                raise _cut(
                    self.path, f"it ends {missing} bytes before the end of {info.name!r}", self.members - 1
                )
            self._row(info, (info.offset_data, info.size, int(info.mtime * 1_000_000_000)))
        else:
            self.listing.note("link" if info.issym() else "special_file", info.name)

    def _hard_link(self, info: tarfile.TarInfo) -> None:
        target = self.data.get(safe_name(info.linkname) or "")
        if target is None:
            self.listing.note("link", f"{info.name} -> {info.linkname}")
        else:
            self._row(info, target)

    def _row(self, info: tarfile.TarInfo, where: tuple[int, int, int]) -> None:
        name = accept(
            self.listing, posixpath.normpath(info.name) if info.name.startswith("./") else info.name
        )
        if name is not None:
            self.listing.names.append(name)
            self.rows.append(where)
            self.data[name] = where


def list_tar(path: Path) -> Listing:
    """Lists a tar's images. Raises :class:`UserError` when it is compressed, cut or damaged."""
    walk = _Walk(path)
    if walk.total == 0:
        raise _cut(path, "the file is empty", 0)
    try:
        with tarfile.open(path, "r:", errorlevel=2) as archive:
            while (info := archive.next()) is not None:
                walk.add(info)
                archive.members.clear()  # type: ignore[attr-defined]  # half a million TarInfo objects would be kept for nothing
            _check_end(path, archive.offset, walk)
    except tarfile.TarError as error:
        raise _cut(path, f"it can't be read as a tar ({error})", walk.members) from None
    listing, table = walk.listing, np.array(walk.rows, np.int64).reshape(-1, 3)
    listing.header, listing.stored, listing.mtime = table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy()
    listing.size = listing.stored.copy()
    listing.method = np.full(len(listing.names), STORED, np.uint8)
    listing.crc = np.full(len(listing.names), NO_CRC, np.int64)
    drop_duplicates(listing)
    return listing


def _check_end(path: Path, offset: int, walk: _Walk) -> None:
    """``tarfile`` takes a damaged header for the end; a real end is a block of zeros, or the end of the
    file.
    """
    with path.open("rb") as stream:
        stream.seek(offset)
        block = stream.read(BLOCK)
    # tarfile's offset is behind the block that it took for the end, or at it, depending on what it found.
    if block.strip(b"\0") and walk.total - offset > 0:
        raise _cut(path, f"the header at byte {offset} is damaged", walk.members)
    if not block:
        walk.listing.note("no_end_mark", "the tar has no end mark; it may have been cut between two members")
