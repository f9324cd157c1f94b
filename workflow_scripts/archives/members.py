"""What a listing is: one row per image, as columns, and notes on what was left out and why."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

StoreType = Literal["zip", "tar", "folder"]
STORED, DEFLATED = 0, 8
NO_CRC = -1
IMAGE_SUFFIXES = frozenset(
    (
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "gif",
        "webp",
        "bmp",
        "tif",
        "tiff",
        "heic",
        "heif",
        "avif",
        "jp2",
        "jxl",
    )
)
EXAMPLES = 10
_DRIVE = re.compile(r"^[A-Za-z]:")


@dataclass
class Note:
    """Something that the reader of a report should know: how often it was seen, with examples."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        """Counts one more and keeps it when it is among the first."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)


@dataclass
class Listing:
    """The images of a store, in its own order.

    ``header`` is where a zip's local header begins, or a tar member's data, or -1 in a folder. ``crc`` is the
    directory's CRC32, -1 where there is none. ``mtime`` is in nanoseconds, 0 where it says nothing.
    """

    type: StoreType
    names: list[str] = field(default_factory=list)
    header: Any = None
    stored: Any = None
    size: Any = None
    method: Any = None
    crc: Any = None
    mtime: Any = None
    problems: dict[int, str] = field(default_factory=dict)
    """Rows that can't be read, and why (encrypted, unknown compression)."""
    others: int = 0
    """Members that are no images by name."""
    notes: dict[str, Note] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def note(self, kind: str, example: str) -> None:
        """Records one member that was left out or is unusual."""
        self.notes.setdefault(kind, Note()).add(example)

    def keep(self, rows: Iterable[int]) -> None:
        """Reduces the listing to ``rows``, in their order."""
        chosen = list(rows)
        place = {old: new for new, old in enumerate(chosen)}
        self.names = [self.names[row] for row in chosen]
        for column in ("header", "stored", "size", "method", "crc", "mtime"):
            setattr(self, column, np.asarray(getattr(self, column))[chosen])
        self.problems = {place[row]: why for row, why in self.problems.items() if row in place}


def safe_name(raw: str) -> str | None:
    """The member's name with ``/`` between folders, or ``None`` when it would leave the folder.

    Refused: absolute names, drive letters, ``..``, control characters, names that are no text. Nothing is
    ever written by these names, but they end up in annotations, reports and other people's extraction
    scripts.
    """
    name = raw.replace("\\", "/")
    if name.startswith("/") or _DRIVE.match(name) or any(ord(c) < 32 or ord(c) == 127 for c in name):
        return None
    if any("\ud800" <= c <= "\udfff" for c in name):  # bytes that are no UTF-8
        return None
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return None if ".." in parts or not parts else "/".join(parts)


def is_plain(name: str) -> bool:
    """True for names that need no second look; the cheap test for the common case."""
    return (
        name.isprintable()
        and "\\" not in name
        and "//" not in name
        and "./" not in name
        and not name.startswith("/")
        and not name.endswith("..")
        and name[1:2] != ":"
    )


def is_litter(name: str) -> bool:
    """What operating systems leave behind: resource forks, thumbnails caches."""
    return "__MACOSX/" in name or name.rsplit("/", 1)[-1].startswith("._")


def is_image_name(name: str) -> bool:
    """True for names with an image suffix, and for names with none."""
    dot = name.rfind(".")
    return dot <= name.rfind("/") or name[dot + 1 :].lower() in IMAGE_SUFFIXES


def accept(listing: Listing, raw: str) -> str | None:
    """The safe name of an image member, or ``None`` when it is left out; the listing says why."""
    name: str | None = raw if is_plain(raw) else safe_name(raw)
    if name is None:
        listing.note("unsafe_name", ascii(raw)[:200])
    elif is_litter(name) or not is_image_name(name):
        listing.others += 1
    else:
        return name
    return None


def drop_duplicates(listing: Listing) -> None:
    """Keeps the last of equal names, as extraction would; notes names that some file systems can't tell
    apart.
    """
    last = {name: row for row, name in enumerate(listing.names)}
    if len(last) < len(listing.names):
        for row, name in enumerate(listing.names):
            if last[name] != row:
                listing.note("duplicate_name", name)
        listing.keep(sorted(last.values()))
    folded: dict[str, str] = {}
    for name in listing.names:
        key = name.casefold() if name.isascii() else unicodedata.normalize("NFC", name).casefold()
        if (other := folded.setdefault(key, name)) != name:
            listing.note("same_but_for_case_or_unicode_form", f"{other} / {name}")
