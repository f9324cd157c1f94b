"""What a branch or a tag of a hub was when a source was first fetched: it stays that commit for this folder.

A branch can move between the files of one download, or between a download and the next one, whose trainings
and scores would have the same names. Light: the plan reads it too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from workflow_scripts.io import read_json, write_json

SHORT_COMMIT = re.compile(r"[0-9a-f]{7,39}")
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit, in full or its first digits, and so has the same files for ever."""
    return bool(COMMIT.fullmatch(revision) or SHORT_COMMIT.fullmatch(revision))


@dataclass(frozen=True)
class Settled:
    """Where it is noted which commit a source's revision was.

    Attributes:
        name: the source's.
        sources: the folder of all sources; a deleted download leaves the note.
    """

    name: str
    sources: Path

    @property
    def path(self) -> Path:
        """The note."""
        return self.sources / ".known" / "commits" / f"{self.name}.json"

    def read(self, repo: str, revision: str) -> str | None:
        """The commit; None where this revision of this repository was not fetched here."""
        said = read_json(self.path) if self.path.is_file() else {}
        is_it = (said.get("repo"), said.get("revision")) == (repo, revision)
        return str(said["commit"]) if is_it else None

    def write(self, repo: str, revision: str, commit: str) -> None:
        """Notes it."""
        write_json(self.path, {"repo": repo, "revision": revision, "commit": commit})
