"""Files that were verified: their hashes, and beside each a note of where it came from."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workflow_scripts.acquire.answers import web_advice
from workflow_scripts.acquire.voice import say
from workflow_scripts.disk import size_text
from workflow_scripts.io import UserError, read_json, write_json

CHUNK = 1 << 18
"""Bytes a read, at most."""


@dataclass(frozen=True)
class Wanted:
    """One file to fetch, and what is known about it beforehand."""

    name: str
    urls: tuple[str, ...]
    """In the order in which they are tried. ``${NAME}`` in them stands for a value of the environment."""
    bytes: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None
    """Small files of a hub have a git hash instead of a sha256."""
    first_use: bool = False
    """Another sha256 is recorded with a warning instead of being an error."""
    role: str = "other"
    """Without a hash, `images` must be a whole archive and `annotations` a whole list of records."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent to the host of the first URL only: they can hold a token."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Goes into the provenance: repository, revision."""
    advice: Mapping[int, str] = field(default_factory=web_advice)
    """What to do about an HTTP status that every later request would get too."""

    @property
    def by_hash(self) -> bool:
        """The hash decides, so that a rest may come from anywhere, whatever servers say about versions."""
        return bool((self.sha256 and not self.first_use) or self.git_sha1)


def provenance_path(target: Path) -> Path:
    """Where a fetched file's origin is remembered."""
    return target.with_name(f".{target.name}.provenance.json")


def recall(target: Path) -> dict[str, Any] | None:
    """The provenance of a file that has not changed since it was verified."""
    path = provenance_path(target)
    if not target.is_file() or not path.is_file():
        return None
    with contextlib.suppress(UserError, KeyError, TypeError):
        known = read_json(path)
        stat = target.stat()
        if known["bytes"] == stat.st_size and known.pop("mtime_ns") == stat.st_mtime_ns:
            return dict(known)
    return None


def remember(target: Path, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Saves where ``target`` came from; returns it."""
    write_json(provenance_path(target), {**provenance, "mtime_ns": target.stat().st_mtime_ns})
    return dict(provenance)


def already_there(wanted: Wanted, target: Path) -> dict[str, Any] | None:
    """The provenance of a whole file that is there already; a wrong one is set aside."""
    known = recall(target)
    if known is None and target.is_file():
        say(f"{target}: verifying the file that is there ({size_text(target.stat().st_size)})")
        sha, git = hash_file(target)
        known = {"bytes": target.stat().st_size, "sha256": sha, "git_sha1": git, **wanted.facts, "url": None}
        known["time"] = now()
    if known is None:
        return None
    if (why := objection(wanted, known["bytes"], known["sha256"], known.get("git_sha1"))) is None:
        known.pop("git_sha1", None)
        return remember(target, known)
    aside = target.with_name(f"{target.name}.wrong-{known['sha256'][:8]}")
    say(f"warning: {target}: {why}; moved to {aside.name}, fetching it again")
    target.replace(aside)
    return None


def objection(wanted: Wanted, size: int, sha: str, git: str | None) -> str | None:
    """Why a file of this size and these hashes is not the wanted one."""
    if wanted.bytes is not None and size != wanted.bytes and not wanted.first_use:
        return f"has {size} bytes, {wanted.bytes} are expected"
    if wanted.sha256 is not None and sha != wanted.sha256:
        if not wanted.first_use:
            return f"has sha256 {sha}, {wanted.sha256} is expected"
        say(f"warning: {wanted.name}: sha256 is {sha}, elsewhere it was {wanted.sha256}; recorded as it is")
    if wanted.git_sha1 is not None and git is not None and git != wanted.git_sha1:
        return f"has git hash {git}, {wanted.git_sha1} is expected"
    return None


class Hasher:
    """sha256, and git's blob hash, of a file that grows; ``done`` bytes are in."""

    def __init__(self, size: int | None, git: bool = True) -> None:
        self.sha = hashlib.sha256()
        self.git = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
        self.with_git, self.done = git, 0

    def update(self, data: bytes | memoryview) -> None:
        """Takes in the next bytes."""
        self.sha.update(data)
        if self.with_git:
            self.git.update(data)
        self.done += len(data)

    def catch_up(self, path: Path) -> None:
        """Takes in what is on the disk already."""
        with path.open("rb") as stream:
            stream.seek(self.done)
            while piece := stream.read(CHUNK):
                self.update(piece)

    def results(self) -> tuple[str, str]:
        """The two hashes, in hexadecimal digits."""
        return self.sha.hexdigest(), self.git.hexdigest()


def hash_file(path: Path) -> tuple[str, str]:
    """sha256 and git's blob hash of a file."""
    hasher = Hasher(path.stat().st_size)
    hasher.catch_up(path)
    return hasher.results()


def now() -> str:
    """The time, for provenance."""
    return datetime.now(UTC).isoformat(timespec="seconds")
