"""The images below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from workflow_scripts.archives.members import NO_CRC, STORED, Listing, accept


def _walk(root: Path, below: str, listing: Listing) -> Iterator[tuple[str, os.stat_result]]:
    """Yields (name, stat) in the order of names; links to files inside the folder are followed, others
    noted.
    """
    with os.scandir(root / below if below else root) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(root, name, listing)
        elif entry.is_symlink() and not _link_is_fine(root, entry):
            listing.note("link", name)
        elif entry.is_file():
            yield name, entry.stat()


def _link_is_fine(root: Path, entry: os.DirEntry[str]) -> bool:
    """A linked file inside the folder is an image like another; what leads out of the folder is not
    followed.
    """
    target = Path(os.path.realpath(entry.path))
    return target.is_file() and target.is_relative_to(os.path.realpath(root))


def list_folder(root: Path) -> Listing:
    """Lists the images below a folder, sorted by name."""
    listing = Listing("folder")
    sizes: list[int] = []
    times: list[int] = []
    for name, stat in _walk(root, "", listing):
        accepted = accept(listing, name.encode("utf-8", "backslashreplace").decode())
        if accepted == name:
            listing.names.append(name)
            sizes.append(stat.st_size)
            times.append(stat.st_mtime_ns)
        elif accepted is not None:
            listing.note("unsafe_name", ascii(name))
    listing.size = np.array(sizes, np.int64)
    listing.stored = listing.size.copy()
    listing.mtime = np.array(times, np.int64)
    listing.header = np.full(len(sizes), -1, np.int64)
    listing.method = np.full(len(sizes), STORED, np.uint8)
    listing.crc = np.full(len(sizes), NO_CRC, np.int64)
    return listing
