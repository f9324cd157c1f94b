"""Reads members by offset from several threads at once: one ``pread`` per image, CRC verified."""

from __future__ import annotations

import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path

from isal import isal_zlib

from workflow_scripts.archives.members import DEFLATED, Listing, StoreType, safe_name
from workflow_scripts.archives.zips import LOCAL, UTF8, decode_name

SLACK = 64
"""A local header's extra field can be longer than the central one's; most fit into this."""


class DamagedMember(Exception):
    """A member whose bytes can't be had; the message says why."""


class TooLargeMember(DamagedMember):
    """A member that is larger than anybody's image; it is not read."""


@dataclass(frozen=True)
class Piece:
    """A member's content: where its data begin in the archive (-1 in a folder), its bytes, their CRC32."""

    offset: int
    data: bytes
    crc: int


class StoreReader:
    """Reads members of one store; safe to share between threads."""

    def __init__(self, path: Path, kind: StoreType) -> None:
        self.path, self.kind = path, kind
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
        self.fd = os.open(path, flags | (os.O_DIRECTORY if kind == "folder" else 0))

    def close(self) -> None:
        """Closes the archive."""
        os.close(self.fd)

    def __enter__(self) -> StoreReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, listing: Listing, row: int, max_bytes: int) -> Piece:
        """Reads one member. Raises :class:`DamagedMember` when its bytes can't be had."""
        if why := listing.problems.get(row):
            raise DamagedMember(why)
        size, stored = int(listing.size[row]), int(listing.stored[row])
        if max(size, stored) > max_bytes:
            raise TooLargeMember(f"{size} bytes, more than the limit of {max_bytes}")
        if self.kind == "folder":
            return self._from_folder(listing.names[row], max_bytes)
        if self.kind == "tar":
            data = self._exactly(int(listing.header[row]), stored)
            return Piece(int(listing.header[row]), data, isal_zlib.crc32(data))
        return self._from_zip(listing, row, size, stored)

    def _exactly(self, offset: int, size: int) -> bytes:
        data = os.pread(self.fd, size, offset)
        while len(data) < size:
            more = os.pread(self.fd, size - len(data), offset + len(data))
            if not more:
                raise DamagedMember(
                    f"the archive ends {size - len(data)} bytes before the end of this member"
                )
            data += more
        return data

    def _from_folder(self, name: str, max_bytes: int) -> Piece:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=self.fd)
        except OSError as error:
            raise DamagedMember(f"can't be opened ({error.strerror})") from None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise DamagedMember("not a plain file")
            if status.st_size > max_bytes:  # it grew since it was listed
                raise TooLargeMember(f"{status.st_size} bytes, more than the limit of {max_bytes}")
            with os.fdopen(os.dup(fd), "rb", buffering=0) as stream:
                data = stream.read()
        finally:
            os.close(fd)
        return Piece(-1, data, isal_zlib.crc32(data))

    def _from_zip(self, listing: Listing, row: int, size: int, stored: int) -> Piece:
        header = int(listing.header[row])
        name = listing.names[row]
        block = os.pread(self.fd, LOCAL.size + len(name.encode()) + SLACK + stored, header)
        begin = local_data_start(block, name)
        packed = block[begin : begin + stored]
        if len(packed) < stored:
            packed += self._exactly(header + begin + len(packed), stored - len(packed))
        data = inflate(packed, size) if listing.method[row] == DEFLATED else packed
        crc = isal_zlib.crc32(data)
        return Piece(header + begin, data, crc)

    def data_start(self, listing: Listing, row: int) -> int:
        """Where a zip member's data begin, from its local header alone."""
        if self.kind != "zip":
            return int(listing.header[row])
        name = listing.names[row]
        header = int(listing.header[row])
        block = os.pread(self.fd, LOCAL.size + 4 * len(name.encode()) + SLACK, header)
        return header + local_data_start(block, name)


def local_data_start(block: bytes, name: str) -> int:
    """Length of a zip's local header, checked to be one and to belong to ``name``."""
    if len(block) < LOCAL.size or block[:4] != b"PK\3\4":
        raise DamagedMember("there is no local header where the directory says")
    fields = LOCAL.unpack_from(block)
    flags, n_name, n_extra = fields[2], fields[9], fields[10]
    raw = block[LOCAL.size : LOCAL.size + n_name]
    own = decode_name(raw, flags)
    # Some writers set the UTF-8 flag in one of the two headers only.
    if own != name and name not in {safe_name(decode_name(raw, either)) for either in (0, UTF8)}:
        raise DamagedMember(f"its local header has another name ({own[:100]!r})")
    return LOCAL.size + n_name + n_extra


def inflate(packed: bytes, size: int) -> bytes:
    """Raw deflate, stopped at one byte more than announced, so that a zip bomb stays small."""
    decoder = isal_zlib.decompressobj(-15)
    try:
        data: bytes = decoder.decompress(packed, size + 1)
    except (isal_zlib.error, zlib.error) as error:  # type: ignore[misc]
        raise DamagedMember(f"its deflate data are damaged ({error})") from None
    if len(data) != size:
        raise DamagedMember(
            f"unpacks to {'more' if len(data) > size else 'fewer'} than the {size} bytes announced"
        )
    return data
