"""Fetches big files over HTTP so that what arrives is whole, verified, and never fetched twice.

Data stream into `NAME.part`; a connection that breaks, stalls or is refused for a while is resumed from there, by
this process or by the next one after a crash. The hash is computed while the data stream in. Only a file of the
right size and hash gets its name, and beside it `.NAME.provenance.json` remembers where it came from.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import requests
import urllib3

from workflow_scripts.disk import FULL_DISK, check_disk
from workflow_scripts.io import UserError, fsync_directory, read_json, write_json

CHUNK = 1 << 18
"""Bytes a read: a broken connection loses at most these."""
RETRIED = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 524}
BROKEN = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    urllib3.exceptions.HTTPError,
    ConnectionError,
    TimeoutError,
)
_HTML = re.compile(rb"\s*(<!doctype\s+html|<html|<head)", re.IGNORECASE)


@dataclass(frozen=True)
class Wanted:
    """One file to fetch, and what is known about it beforehand."""

    name: str
    urls: tuple[str, ...]
    bytes: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None
    """Small files of a hub have a git hash instead of a sha256."""
    first_use: bool = False
    """Another sha256 is recorded with a warning instead of being an error."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent to the host of the first URL only: they can hold a token."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Goes into the provenance: repository, revision."""


@dataclass(frozen=True)
class Patience:
    """How long to try. ``attempts`` counts those in a row that bring no new byte."""

    attempts: int = 8
    backoff_s: float = 1.0
    max_backoff_s: float = 120.0
    connect_s: float = 20.0
    read_s: float = 60.0
    per_host: int = 2
    hosts: Path | None = None
    """Folder for the locks that limit connections per host among all processes; None: no limit."""


class MirrorFailed(Exception):
    """This URL will not give the file; the next one is tried."""


class TryAgain(Exception):
    """This attempt failed in a way that may pass; ``wait`` is what the server asked for, in seconds."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class Transfer(Exception):
    """Internal: the part file does not fit what the server has now and is started over."""


def fetch(wanted: Wanted, target: Path, patience: Patience | None = None) -> dict[str, Any]:
    """Makes ``target`` the verified file and returns its provenance.

    Raises :class:`UserError` when no URL gives it, saying what was tried, what is kept and what to do.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(target):
        if (known := already_there(wanted, target)) is not None:
            return known
        return _Fetch(wanted, target, patience or Patience()).run()


# ---------------------------------------------------------------------------------------------------------------
# What is there already


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
        print(f"{target}: verifying the file that is there", file=sys.stderr, flush=True)
        sha, git = hash_file(target)
        known = {"bytes": target.stat().st_size, "sha256": sha, "git_sha1": git, **wanted.facts, "url": None}
        known["time"] = _now()
    if known is None:
        return None
    if (why := _objection(wanted, known["bytes"], known["sha256"], known.get("git_sha1"))) is None:
        known.pop("git_sha1", None)
        return remember(target, known)
    aside = target.with_name(f"{target.name}.wrong-{known['sha256'][:8]}")
    print(f"warning: {target}: {why}; moved to {aside.name}, fetching it again", file=sys.stderr, flush=True)
    target.replace(aside)
    return None


def hash_file(path: Path) -> tuple[str, str]:
    """sha256 and git's blob hash of a file."""
    hasher = _Hasher(path.stat().st_size)
    hasher.catch_up(path)
    return hasher.results()


def _objection(wanted: Wanted, size: int, sha: str, git: str | None) -> str | None:
    """Why a file of this size and these hashes is not the wanted one."""
    if wanted.bytes is not None and size != wanted.bytes and not wanted.first_use:
        return f"has {size} bytes, {wanted.bytes} are expected"
    if wanted.sha256 is not None and sha != wanted.sha256:
        if not wanted.first_use:
            return f"has sha256 {sha}, {wanted.sha256} is expected"
        print(
            f"warning: {wanted.name}: sha256 is {sha}, a copy elsewhere had {wanted.sha256}; recorded as it is",
            file=sys.stderr,
            flush=True,
        )
    if wanted.git_sha1 is not None and git is not None and git != wanted.git_sha1:
        return f"has git hash {git}, {wanted.git_sha1} is expected"
    return None


class _Hasher:
    """sha256, and git's blob hash, of a file that grows; ``done`` bytes are in."""

    def __init__(self, size: int | None, git: bool = True) -> None:
        self.sha = hashlib.sha256()
        self.git = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
        self.with_git, self.done = git, 0

    def update(self, data: bytes | memoryview) -> None:
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
        return self.sha.hexdigest(), self.git.hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# Fetching


class _Fetch:
    """One file's way from the first URL that gives it to its verified place."""

    def __init__(self, wanted: Wanted, target: Path, patience: Patience) -> None:
        self.wanted, self.target, self.patience = wanted, target, patience
        self.part = target.with_name(target.name + ".part")
        self.meta_path = target.with_name(target.name + ".part.json")
        self.meta: dict[str, Any] = read_json(self.meta_path) if self.meta_path.is_file() else {}
        self.resumed = False
        self.refetched: set[str] = set()
        self.by_hash = bool((wanted.sha256 and not wanted.first_use) or wanted.git_sha1)
        """The hash decides, so that a rest may come from anywhere, whatever the ETags say."""
        self.hasher = self._new_hasher()
        self.session = requests.Session()
        self.progress = ByteProgress(target.name)

    def _new_hasher(self) -> _Hasher:
        return _Hasher(self.wanted.bytes, git=self.wanted.git_sha1 is not None)

    def run(self) -> dict[str, Any]:
        """Tries the URLs in order."""
        failures = []
        try:
            for url in self.wanted.urls:
                try:
                    return self._from(url)
                except MirrorFailed as error:
                    failures.append(f"  {_public(url)}: {error}")
                    print(f"{self.wanted.name}: {_public(url)}: {error}", file=sys.stderr, flush=True)
            raise UserError(self._give_up(failures))
        except OSError as error:
            if isinstance(error, requests.RequestException):
                raise
            raise UserError(self._disk_trouble(error)) from None
        finally:
            self.progress.close()
            self.session.close()

    def _give_up(self, failures: list[str]) -> str:
        kept = f"{self._have()} bytes are kept in {self.part}; " if self._have() else ""
        return (
            f"{self.wanted.name} could not be fetched:\n"
            + "\n".join(failures)
            + f"\n  {kept}run the same command "
            "again to go on, add another URL to the source's config, or fetch the file by other means and name it "
            "under `local` (or as a source of kind path)"
        )

    def _disk_trouble(self, error: OSError) -> str:
        total = self.wanted.bytes or self.meta.get("total")
        of = f" of {total}" if total else ""
        if error.errno in FULL_DISK:
            return (
                f"{self.part}: the disk is full (or a quota is); {self._have()}{of} bytes are kept. Free space on "
                "that disk, or put the working folder on a larger one, and run the same command again to go on"
            )
        return f"{self.part}: {error.strerror}; {self._have()}{of} bytes are kept"

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _from(self, url: str) -> dict[str, Any]:
        """Tries one URL until it gives the file or has brought nothing new ``attempts`` times in a row."""
        fruitless = 0
        while True:
            before = self._have()
            try:
                with host_slot(url, self.patience):
                    self._attempt(url)
                return self._verify(url)
            except Transfer:
                self._discard()
                fruitless += 1
                wait: float | None = 0.0
                why = "started over"
            except TryAgain as error:
                fruitless = 0 if self._have() > before else fruitless + 1
                why, wait = str(error), error.wait
            if fruitless >= self.patience.attempts:
                raise MirrorFailed(f"{why} ({fruitless} attempts)")
            self._sleep(fruitless, wait, why)

    def _sleep(self, fruitless: int, wait: float | None, why: str) -> None:
        pause = min(self.patience.backoff_s * 2 ** max(0, fruitless - 1), self.patience.max_backoff_s)
        pause *= 0.5 + random.random() / 2
        if wait is not None:
            pause = wait
        if pause:
            print(f"{self.wanted.name}: {why}; again in {pause:.1f} s", file=sys.stderr, flush=True)
        time.sleep(pause)

    def _discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.meta_path.unlink(missing_ok=True)
        self.meta, self.resumed, self.hasher = {}, False, self._new_hasher()

    # -- one attempt

    def _attempt(self, url: str) -> None:
        have = self._have()
        total = self.wanted.bytes or self.meta.get("total")
        if have and ((not self.by_hash and self.meta.get("url") != _public(url)) or have > (total or have)):
            raise Transfer  # nobody could tell whether this part and the rest belong together
        self.resumed = self.resumed or have > 0
        if have and have == total:
            return
        try:
            with self.session.get(
                url,
                headers=self._headers(url, have),
                stream=True,
                auth=_keep_headers,
                timeout=(self.patience.connect_s, self.patience.read_s),
            ) as response:
                self._receive(url, response, have)
        except requests.exceptions.SSLError as error:
            raise MirrorFailed(f"the connection can't be trusted ({error})") from None
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            raise MirrorFailed(str(error)) from None
        except requests.TooManyRedirects:
            raise MirrorFailed("redirects without end") from None
        except BROKEN as error:
            raise TryAgain(_short(error)) from None

    def _headers(self, url: str, have: int) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity", "User-Agent": "llava-spatial-workflow"}
        if urlsplit(url).netloc == urlsplit(self.wanted.urls[0]).netloc:
            headers |= self.wanted.headers
        if have:
            headers["Range"] = f"bytes={have}-"
            validator = _strong(self.meta.get("etag")) or self.meta.get("last_modified")
            if validator and not self.by_hash:
                headers["If-Range"] = validator
        return headers

    def _receive(self, url: str, response: requests.Response, have: int) -> None:
        """Checks the answer, then streams its body to the end of the part file."""
        if response.status_code == 416 and have:
            self._after_416(response, have)
            return
        _check_status(response)
        if response.headers.get("Content-Encoding", "identity") not in ("identity", ""):
            raise MirrorFailed(
                "the server compresses the file on its own account, so it can't be resumed or checked"
            )
        total, begin = self._place(response, have)
        pieces = response.raw.stream(CHUNK, decode_content=False)
        first = next(pieces, b"")
        if begin == 0 and _HTML.match(first[:512]) and not self.target.name.endswith((".html", ".htm")):
            raise MirrorFailed("the server sent a web page instead of the file (a login or error page?)")
        self._check_total(total)
        self._check_same(response, begin)
        skip = self._skip_or_restart(response, have, total) if have and begin == 0 else 0
        self._save_meta(url, response, total)
        self._check_disk(total, have)
        self._write(_chain(first, pieces), skip, total)

    def _after_416(self, response: requests.Response, have: int) -> None:
        total = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("Content-Range", ""))
        if total is None or int(total[1]) != have:
            raise Transfer
        self.meta["total"] = have

    def _place(self, response: requests.Response, have: int) -> tuple[int | None, int]:
        """(total size if the server says it, where the body begins)."""
        if response.status_code == 206:
            match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != have:
                raise Transfer
            return (None if match[3] == "*" else int(match[3])), have
        length = response.headers.get("Content-Length")
        return (int(length) if length and length.isdigit() else None), 0

    def _check_total(self, total: int | None) -> None:
        expected = self.wanted.bytes
        if expected is None or total is None or total == expected:
            return
        if self.wanted.first_use:
            print(
                f"warning: {self.wanted.name}: {total} bytes, {expected} elsewhere",
                file=sys.stderr,
                flush=True,
            )
            return
        raise MirrorFailed(f"the server's file has {total} bytes, {expected} are expected")

    def _changed(self, response: requests.Response) -> bool | None:
        """Whether this is another version than that of the part; None when the server says nothing about it."""
        told = [(self.meta.get(key), response.headers.get(header)) for key, header in _VALIDATORS]
        both = [(old, new) for old, new in told if old and new]
        return any(old != new for old, new in both) if both else None

    def _skip_or_restart(self, response: requests.Response, have: int, total: int | None) -> int:
        """The server sends everything although a rest was asked for: what is there stays if it is the same file."""
        if (total is None or total >= have) and (self.by_hash or self._changed(response) is False):
            return have
        print(
            f"{self.wanted.name}: the file changed on the server; starting over", file=sys.stderr, flush=True
        )
        self._discard()
        return 0

    def _check_same(self, response: requests.Response, begin: int) -> None:
        """A server may ignore If-Range: the rest of another version must not be added."""
        if begin > 0 and not self.by_hash and self._changed(response):
            raise Transfer

    def _save_meta(self, url: str, response: requests.Response, total: int | None) -> None:
        self.meta = {
            "url": _public(url),
            "etag": response.headers.get("ETag"),
            "last_modified": response.headers.get("Last-Modified"),
            "total": total if total is not None else self.wanted.bytes,
        }
        write_json(self.meta_path, self.meta)

    def _check_disk(self, total: int | None, have: int) -> None:
        if total is not None:
            check_disk(self.target.parent, total - have, self.wanted.name)

    def _write(self, pieces: Iterator[bytes], skip: int, total: int | None) -> None:
        with self.part.open("ab", buffering=0) as stream:
            done = stream.tell()
            self.hasher.catch_up(self.part)
            self.progress.start(done, total)
            try:
                for piece in pieces:
                    if skip:
                        dropped = min(skip, len(piece))
                        skip, piece = skip - dropped, piece[dropped:]
                    _write_all(stream, piece)
                    self.hasher.update(piece)
                    self.progress.add(len(piece))
            except BROKEN as error:
                raise TryAgain(_short(error)) from None
            size = stream.tell()
        if total is not None and size < total:
            raise TryAgain(f"the connection ended after {size} of {total} bytes")
        if total is not None and size > total:
            raise Transfer

    # -- the end

    def _verify(self, url: str) -> dict[str, Any]:
        """Judges the complete part."""
        self.part.touch()
        self.hasher.catch_up(self.part)
        size, (sha, git) = self._have(), self.hasher.results()
        why = _objection(self.wanted, size, sha, git)
        if why is None:
            return self._finish(size, sha)
        if self.resumed and url not in self.refetched:
            self.refetched.add(url)
            # Perhaps only the part from an earlier attempt was bad; one fresh copy decides.
            print(f"{self.wanted.name}: {why}; fetching it once more", file=sys.stderr, flush=True)
            raise Transfer
        evidence = self.target.with_name(f"{self.target.name}.wrong-{sha[:8]}")
        self.part.replace(evidence)
        self._discard()
        raise MirrorFailed(f"the file {why}; kept for a look as {evidence}")

    def _finish(self, size: int, sha: str) -> dict[str, Any]:
        with self.part.open("rb") as stream:
            os.fsync(stream.fileno())
        self.part.replace(self.target)
        fsync_directory(self.target.parent)
        provenance = {
            "bytes": size,
            "sha256": sha,
            "verified": bool(self.wanted.sha256 == sha or self.wanted.git_sha1),
            "url": self.meta.get("url"),
            "etag": self.meta.get("etag"),
            "last_modified": self.meta.get("last_modified"),
            "time": _now(),
            **self.wanted.facts,
        }
        kept = remember(self.target, provenance)
        self.meta_path.unlink(missing_ok=True)
        return kept


_VALIDATORS = (("etag", "ETag"), ("last_modified", "Last-Modified"))


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest


def _write_all(stream: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def _check_status(response: requests.Response) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    reason = f"HTTP {status} {response.reason or ''}".strip()
    if status in RETRIED:
        raise TryAgain(reason, retry_after(response.headers.get("Retry-After")))
    hint = ""
    if status in (401, 403):
        hint = ": a token or the acceptance of terms is needed (set HF_TOKEN for the hub)"
    elif status in (404, 410):
        hint = ": the file is not there any more"
    raise MirrorFailed(reason + hint)


def retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After header asks for (a number or a date), at most an hour."""
    if not value:
        return None
    if value.strip().isdigit():
        return min(float(value), 3600.0)
    with contextlib.suppress(ValueError, TypeError):
        wait = (parsedate_to_datetime(value) - (now or datetime.now(UTC))).total_seconds()
        return min(max(wait, 0.0), 3600.0)
    return None


def _keep_headers(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Keeps requests from putting a .netrc's password in the place of our own header."""
    if "Authorization" not in request.headers:
        login = requests.utils.get_netrc_auth(request.url or "")
        return requests.auth.HTTPBasicAuth(*login)(request) if login else request
    return request


def _strong(etag: str | None) -> str | None:
    """Weak ETags can't be used with If-Range."""
    return None if not etag or etag.startswith("W/") else etag


def _public(url: str) -> str:
    """A URL without its query, which may hold a signature or a key."""
    return urlsplit(url)._replace(query="", fragment="").geturl()


def _short(error: Exception) -> str:
    text = re.sub(r"https?://\S+", _strip_match, str(error))
    return f"{type(error).__name__}: {text}"[:200]


def _strip_match(match: re.Match[str]) -> str:
    return _public(match[0])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def _only_one(target: Path) -> Iterator[None]:
    """Two processes never write the same part file."""
    with target.with_name(f".{target.name}.lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{target}: another process is fetching it; wait for that one") from None
        except OSError:  # some network file systems know no locks
            pass
        yield


@contextlib.contextmanager
def host_slot(url: str, patience: Patience, sleep: Callable[[float], None] = time.sleep) -> Iterator[None]:
    """Waits until fewer than ``per_host`` downloads use this host, among all processes of this working folder."""
    if patience.hosts is None:
        yield
        return
    patience.hosts.mkdir(parents=True, exist_ok=True)
    host = re.sub(r"[^\w.-]", "_", urlsplit(url).netloc)
    waited = False
    while True:
        for number in range(patience.per_host):
            stream = (patience.hosts / f"{host}.{number}").open("w")
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.close()
                continue
            except OSError:
                pass
            with stream:
                yield
            return
        if not waited:
            print(f"waiting for a free connection to {host}", file=sys.stderr, flush=True)
            waited = True
        sleep(0.2)


class ByteProgress:
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, name: str, every_s: float = 10.0) -> None:
        self.name, self.every_s = name, every_s
        self.bar: Any = None
        self.total: int | None = None
        self.done = self.begin = 0
        self.started = self.last = time.monotonic()

    def start(self, done: int, total: int | None) -> None:
        """Goes on at ``done`` of ``total`` bytes."""
        self.done = self.begin = done
        self.total, self.started, self.last = total, time.monotonic(), time.monotonic()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.close()
            self.bar = tqdm(
                total=total, initial=done, unit="B", unit_scale=True, desc=self.name, dynamic_ncols=True
            )

    def add(self, count: int) -> None:
        """``count`` more bytes are on the disk."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
            return
        now = time.monotonic()
        if now - self.last >= self.every_s:
            self.last = now
            print(self._line(now), file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        rate = (self.done - self.begin) / max(now - self.started, 1e-9)
        if not self.total:
            return f"{self.name}: {self.done / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s"
        left = (self.total - self.done) / max(rate, 1.0)
        return (
            f"{self.name}: {self.done / 1e6:.1f} of {self.total / 1e6:.1f} MB "
            f"({100 * self.done / self.total:.0f} %), {rate / 1e6:.1f} MB/s, {left / 60:.1f} min left"
        )

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
