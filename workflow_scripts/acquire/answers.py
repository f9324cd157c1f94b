"""What a server's answer means: is it the file, a part of it, the same version, and what to do where it is
none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import requests

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 524})
LOGIN = (
    "the server asks for a login or a signature: put the login into ~/.netrc, or write the URL with a ${NAME}"
    " whose value you export"
)
GONE = "the file is not there (any more); check the URL"
# The hub says in a header which of its reasons it is.
HUB_REASONS: Mapping[str, str] = {
    "GatedRepo": "its owner asks for agreement to terms: accept them on its page, and set HF_TOKEN",
    "RevisionNotFound": "the repository has no such revision; check `revision`",
    "EntryNotFound": "the repository has no such file at this revision; check `path` and `revision`",
    "RepoNotFound": "there is no such repository, or it is private and needs an HF_TOKEN that may read it",
}


class MirrorFailed(Exception):
    """This URL will not give the file; the next one is tried."""


class TryAgain(Exception):
    """This attempt failed in a way that may pass; ``wait`` is what the server asked for, as it says it."""

    def __init__(self, why: str, wait: str | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class StartOver(Exception):
    """What is here and what the server has don't belong together; the message says why."""


@dataclass(frozen=True)
class Version:
    """What a server says about which file it gives: compared between the beginning of a file and its rest."""

    etag: str | None = None
    last_modified: str | None = None
    total: int | None = None

    @property
    def strong(self) -> str | None:
        """What may stand in If-Range. A weak ETag may not: it can stay the same when bytes change."""
        return self.last_modified if self.etag is None or self.etag.startswith("W/") else self.etag

    def differs(self, other: Version) -> bool:
        """True when these can't be the same file."""
        mine, theirs = asdict(self), asdict(other)
        return any(mine[key] != theirs[key] for key in mine if None not in (mine[key], theirs[key]))


def version_of(response: requests.Response, total: int | None) -> Version:
    """The version that an answer belongs to."""
    return Version(response.headers.get("ETag"), response.headers.get("Last-Modified"), total)


def length_of(response: requests.Response) -> int | None:
    """Content-Length. Raises :class:`MirrorFailed` where it is said twice and differently."""
    said = {item.strip() for item in response.headers.get("Content-Length", "").split(",")} - {""}
    if len(said) > 1:
        raise MirrorFailed(f"the server says two lengths at once ({', '.join(sorted(said))})")
    text = said.pop() if said else ""
    return int(text) if text.isdecimal() else None


def range_of(response: requests.Response) -> tuple[int, int | None] | None:
    """(first byte, size of the whole file) of a 206; None where it can't be read."""
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
    return None if match is None else (int(match[1]), None if match[3] == "*" else int(match[3]))


def size_of_416(response: requests.Response) -> int | None:
    """The size that a server says when it is asked for bytes behind the end."""
    match = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("Content-Range", ""))
    return None if match is None else int(match[1])


def check_status(response: requests.Response, advice: Mapping[int, str]) -> None:
    """Raises :class:`TryAgain` or :class:`MirrorFailed` for an answer that is not the file."""
    status = response.status_code
    if status in (200, 206):
        if response.headers.get("Content-Encoding", "identity") not in ("identity", ""):
            raise MirrorFailed(
                "the server compresses the file on its own account, so it can't be resumed or checked"
            )
        return
    reason = f"HTTP {status} {(response.reason or '')[:60]}".strip()
    if status in RETRIED:
        raise TryAgain(reason, response.headers.get("Retry-After"))
    hint = HUB_REASONS.get(response.headers.get("X-Error-Code", "")) or advice.get(status)
    raise MirrorFailed(f"{reason}: {hint}" if hint else reason)


def web_advice() -> dict[int, str]:
    """What to do about the answers that every later request would get too, for a plain web server."""
    return {401: LOGIN, 403: LOGIN, 404: GONE, 410: GONE}


def hub_advice(repo: str, page: str, revision: str) -> dict[int, str]:
    """The same for a repository of a hub."""
    login = (
        f"set HF_TOKEN to a valid token that may read {repo}; where the repository is gated, accept its terms"
        f" on {page} first"
    )
    gone = f"{repo} has no such file at revision {revision}; check `path` and `revision`"
    return {401: login, 403: login, 404: gone, 410: gone}


def from_meta(meta: Mapping[str, Any]) -> Version:
    """The version that was noted beside an unfinished file."""
    return Version(meta.get("etag"), meta.get("last_modified"), meta.get("total"))
