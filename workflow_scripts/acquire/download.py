"""Fetches big files over HTTP so that what arrives is whole, verified, of one version, and fetched once.

Data stream into `NAME.part`; a connection that breaks, stalls or is refused for a while is resumed from
there, by this process or by the next one after a crash. The hash is computed while the data stream in. Only a
file of the right size and hash gets its name, and beside it `.NAME.provenance.json` remembers where it came
from.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import requests

from llava_ext.files import flush
from workflow_scripts.acquire import content
from workflow_scripts.acquire.answers import (
    MirrorFailed,
    StartOver,
    TryAgain,
    Version,
    check_status,
    from_meta,
    length_of,
    range_of,
    size_of_416,
    version_of,
)
from workflow_scripts.acquire.connection import (
    BROKEN,
    FINAL,
    explain,
    explain_final,
    is_certificate_error,
    keep_headers,
    new_session,
)
from workflow_scripts.acquire.locks import host_slot, only_one
from workflow_scripts.acquire.patience import Pace, Patience, retry_after
from workflow_scripts.acquire.stopping import pause
from workflow_scripts.acquire.verified import CHUNK, Hasher, Wanted, already_there, now, objection, remember
from workflow_scripts.acquire.voice import Voice
from workflow_scripts.disk import FULL_DISK, check_disk, size_text
from workflow_scripts.io import Hiccup, UserError, read_json, write_json
from workflow_scripts.secrets import MissingSecret, expand, public

OVERLAP = 1 << 16
"""Bytes that are asked for once more, and compared, where a server says nothing about versions."""


def fetch(wanted: Wanted, target: Path, patience: Patience | None = None) -> dict[str, Any]:
    """Makes ``target`` the verified file and returns its provenance.

    Raises :class:`UserError` when no URL gives it, saying what was tried, what is kept and what to do.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    patience = patience or Patience()
    with Voice(wanted.name, patience.say_s, patience.tick_s) as voice:
        work = _Fetch(wanted, target, patience, voice)
        with only_one(target, work.part, voice):
            voice.set_activity("verifying the file that is there")
            return already_there(wanted, target) or work.run()


class _Fetch:
    """One file's way from the first URL that gives it to its verified place."""

    def __init__(self, wanted: Wanted, target: Path, patience: Patience, voice: Voice) -> None:
        self.wanted, self.target, self.patience, self.voice = wanted, target, patience, voice
        self.part = target.with_name(target.name + ".part")
        self.meta_path = target.with_name(target.name + ".part.json")
        self.meta: dict[str, Any] = {}
        self.resumed = False
        self.refetched: set[str] = set()
        self.whole_only: set[str] = set()
        """URLs whose server gives other parts than those that it is asked for."""
        self.hasher = self._new_hasher()
        self.connection: socket.socket | None = None
        self.session = new_session(self._asked)

    def _new_hasher(self) -> Hasher:
        return Hasher(self.wanted.bytes, git=self.wanted.git_sha1 is not None)

    def _asked(self, connection: socket.socket | None) -> None:
        self.connection = connection
        self.voice.expect(connection, self.patience.answer_s)

    def run(self) -> dict[str, Any]:
        """Tries the URLs in order."""
        self.meta = read_json(self.meta_path) if self.meta_path.is_file() else {}
        failures = []
        try:
            for url in self.wanted.urls:
                try:
                    return self._from(url)
                except MirrorFailed as error:
                    failures.append(f"  {public(url)}: {error}")
                    self.voice.say(f"{public(url)}: {error}")
            raise Hiccup(self._give_up(failures))
        except MissingSecret as error:
            raise UserError(f"{self.wanted.name}: {error}") from None
        except OSError as error:
            raise Hiccup(self._disk_trouble(error)) from None
        finally:
            self.session.close()

    def _give_up(self, failures: list[str]) -> str:
        kept = f"{size_text(self._have())} are kept in {self.part}; " if self._have() else ""
        return (
            f"{self.wanted.name} could not be fetched:\n"
            + "\n".join(failures)
            + f"\n  {kept}run the same command again to go on, add another URL to the source's config, or"
            " fetch the file by other means and name it under `local` (or as a source of kind path)"
        )

    def _disk_trouble(self, error: OSError) -> str:
        total = self.wanted.bytes or self.meta.get("total")
        kept = f"{size_text(self._have())}{f' of {size_text(total)}' if total else ''} are kept"
        if error.errno in FULL_DISK:
            return (
                f"{self.part}: the disk is full (or a quota is); {kept}. Free space on "
                "that disk, or put the working folder on a larger one, and run the same command again"
            )
        return f"{self.part}: {error.strerror}; {kept}"

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    # -- one URL

    def _from(self, url: str) -> dict[str, Any]:
        """Tries one URL until it gives the file or the patience with it is at its end."""
        failures, restarts, pace = 0, 0, Pace(self.patience)
        while True:
            before, wait = self._have(), None
            try:
                with host_slot(url, self.patience, self.voice) as waited:
                    pace.discount(waited)
                    self._attempt(url, pace)
                return self._verify(url)
            except StartOver as error:
                restarts, why = restarts + 1, f"{error}; starting over"
                if restarts > self.patience.restarts:
                    raise MirrorFailed(f"{error} ({restarts} times)") from None
                self._discard()
            except TryAgain as error:
                failures = 0 if self._have() > before else failures + 1
                why, wait = str(error), retry_after(error.wait)
                if failures >= self.patience.attempts:
                    raise MirrorFailed(f"{why} ({failures} attempts)") from None
            pace.add(0)
            self._wait(self.patience.pause(failures, wait), why)
            pace.discount(wait or 0.0)

    def _wait(self, seconds: float, why: str) -> None:
        self.voice.say(f"{why}; again in {seconds:.1f} s")
        self.voice.set_activity(f"waiting {seconds:.0f} s to try again ({why})")
        pause(seconds)

    def _discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.meta_path.unlink(missing_ok=True)
        self.meta, self.resumed, self.hasher = {}, False, self._new_hasher()

    # -- one attempt

    def _attempt(self, url: str, pace: Pace) -> None:
        have = self._have()
        total = self.wanted.bytes or self.meta.get("total")
        if have > (total or have):
            raise StartOver(f"{self.part.name} is larger than the file")
        if have and not self.wanted.by_hash and self.meta.get("url") != public(url):
            raise StartOver("its beginning is not known to be from this URL, and no hash would tell")
        self.resumed = self.resumed or have > 0
        if have and have == total:
            return
        begin = self._begin(url, have)
        self.voice.set_activity(f"waiting for an answer of {urlsplit(public(url)).netloc}")
        try:
            with self._ask(url, begin) as response:
                self.voice.relax()
                self._receive(url, response, begin, pace)
        except BROKEN as error:
            raise (MirrorFailed if is_certificate_error(error) else TryAgain)(explain(error)) from None
        finally:
            self.voice.relax()

    def _ask(self, url: str, begin: int) -> requests.Response:
        try:
            return self.session.get(
                expand(url),
                headers=self._headers(url, begin),
                stream=True,
                auth=keep_headers,
                timeout=(self.patience.connect_s, self.patience.read_s),
            )
        except FINAL as error:
            raise MirrorFailed(explain_final(error)) from None

    def _begin(self, url: str, have: int) -> int:
        """The first byte to ask for: the first that is missing, or a few before it to compare them."""
        if url in self.whole_only:
            return 0
        if self.wanted.by_hash or (from_meta(self.meta).strong and self.meta.get("total")):
            return have
        return max(0, have - OVERLAP)

    def _headers(self, url: str, begin: int) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity", "User-Agent": "llava-spatial-workflow"}
        if urlsplit(url).netloc == urlsplit(self.wanted.urls[0]).netloc:
            headers |= self.wanted.headers
        if begin:
            headers["Range"] = f"bytes={begin}-"
            validator = from_meta(self.meta).strong
            if validator and not self.wanted.by_hash:
                headers["If-Range"] = validator
        return headers

    def _receive(self, url: str, response: requests.Response, begin: int, pace: Pace) -> None:
        """Checks the answer, then streams its body to the end of the part file."""
        have = self._have()
        if response.status_code == 416 and begin:
            self._after_416(response, have)
            return
        check_status(response, self.wanted.advice)
        total, first = self._place(url, response, begin)
        version = version_of(response, total)
        pieces = self._pieces(response, pace)
        head = next(pieces, b"")
        if first == 0 and content.is_web_page(head, self.target.name):
            raise MirrorFailed("the server sent a web page instead of the file (a login or error page?)")
        self._check_total(total)
        if have:
            self._check_same(version)
        if total is not None:
            check_disk(self.target.parent, total - have, self.wanted.name)
        rest = self._new_bytes(_chain(head, pieces), first, have)
        self._write(_chain(next(rest, b""), rest), url, version)

    def _after_416(self, response: requests.Response, have: int) -> None:
        """Nothing is left to fetch, if it is the same file: the hash will say, or bytes would have come."""
        size = size_of_416(response)
        if size != have or not self.wanted.by_hash:
            raise StartOver(
                "the file changed on the server" if size is not None else "the server has no rest"
            )
        self.meta["total"] = have

    def _place(self, url: str, response: requests.Response, begin: int) -> tuple[int | None, int]:
        """(total size if the server says it, where the body begins)."""
        length = length_of(response)
        if response.status_code == 200:
            return length, 0
        place = range_of(response)
        if place is None or place[0] != begin:
            # What is here stays: the next request asks for the whole file.
            self.whole_only.add(url)
            said = response.headers.get("Content-Range", "no range")[:60]
            raise TryAgain(f"the server was asked for the bytes from {begin} on and answers with {said!r}")
        return place[1], begin

    def _check_total(self, total: int | None) -> None:
        expected = self.wanted.bytes
        if expected is None or total is None or total == expected:
            return
        if not self.wanted.first_use:
            raise MirrorFailed(f"the server's file has {total} bytes, {expected} are expected")
        self.voice.say(f"warning: {total} bytes, {expected} elsewhere")

    def _check_same(self, version: Version) -> None:
        """Raises :class:`StartOver` where the server says that this is not the file of the beginning."""
        known = from_meta(self.meta)
        if not self.wanted.by_hash:
            if known.differs(version):
                raise StartOver("the file changed on the server")
        elif Version(total=known.total).differs(Version(total=version.total)):
            raise StartOver(f"this file has {version.total} bytes, the one begun with {known.total}")

    def _new_bytes(self, pieces: Iterator[bytes], first: int, have: int) -> Iterator[bytes]:
        """The pieces from byte ``have`` on; those before it are compared with what is here."""
        left = have - first
        if left:
            self.voice.set_activity("comparing what is here with what the server sends")
            with self.part.open("rb") as old:
                old.seek(first)
                while left:
                    piece = next(pieces, b"")
                    same = old.read(min(left, len(piece)))
                    if not piece or not piece.startswith(same):
                        raise StartOver(
                            "the file changed on the server: other bytes stand where some are here"
                        )
                    left -= len(same)
                    if len(piece) > len(same):
                        yield piece[len(same) :]
        yield from pieces

    def _save_meta(self, url: str, version: Version) -> None:
        self.meta = {
            "url": public(url),
            "etag": version.etag,
            "last_modified": version.last_modified,
            "total": version.total if version.total is not None else self.wanted.bytes,
        }
        write_json(self.meta_path, self.meta)

    def _pieces(self, response: requests.Response, pace: Pace) -> Iterator[bytes]:
        """The body as it comes: what has arrived before a connection breaks is not lost."""
        while True:
            self.voice.expect(self.connection, 2 * self.patience.read_s)
            piece = response.raw.read1(CHUNK, decode_content=False)
            if not piece:
                return
            pause(0)
            pace.add(len(piece))
            yield piece

    def _write(self, pieces: Iterator[bytes], url: str, version: Version) -> None:
        """Appends the pieces. What is here and the version that is noted always belong together."""
        total = version.total
        self._save_meta(url, version)
        with self.part.open("ab", buffering=0) as stream:
            self.hasher.catch_up(self.part)
            self.voice.start(stream.tell(), total)
            for piece in pieces:
                _write_all(stream, piece)
                self.hasher.update(piece)
                self.voice.add(len(piece))
            size = stream.tell()
        if total is not None and size < total:
            raise TryAgain(f"the connection ended after {size_text(size)} of {size_text(total)}")
        if total is not None and size > total:
            raise StartOver(f"more than the {total} bytes came that the server announced")

    # -- the end

    def _verify(self, url: str) -> dict[str, Any]:
        """Judges the complete part."""
        self.voice.set_activity("verifying")
        self.part.touch()
        self.hasher.catch_up(self.part)
        size, (sha, git) = self._have(), self.hasher.results()
        why = objection(self.wanted, size, sha, git)
        if why is None and not self.wanted.by_hash:
            why = content.objection(self.part, self.wanted.role, Path(self.wanted.name).suffix)
        if why is None:
            return self._finish(size, sha)
        if self.resumed and url not in self.refetched:
            self.refetched.add(url)
            # Perhaps only the part from an earlier attempt was bad; one fresh copy decides.
            raise StartOver(f"it {why}")
        evidence = self.target.with_name(f"{self.target.name}.wrong-{sha[:8]}")
        self.part.replace(evidence)
        self._discard()
        raise MirrorFailed(f"the file {why}; kept for a look as {evidence}")

    def _finish(self, size: int, sha: str) -> dict[str, Any]:
        flush(self.part)
        self.part.replace(self.target)
        flush(self.target.parent)
        provenance = {
            "bytes": size,
            "sha256": sha,
            "verified": bool(self.wanted.sha256 == sha or self.wanted.git_sha1),
            "url": self.meta.get("url"),
            "etag": self.meta.get("etag"),
            "last_modified": self.meta.get("last_modified"),
            "time": now(),
            **self.wanted.facts,
        }
        kept = remember(self.target, provenance)
        self.meta_path.unlink(missing_ok=True)
        return kept


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest


def _write_all(stream: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]
