"""Archives and folders at random, with odd members: every one is scanned and read as its own bytes, named in
the table, or refused in a message of ours. Nothing is ever written by a member's name.
"""

import io
import os
import tarfile
import warnings
import zipfile

import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from tests.support.fuzzing import tries
from tests.support.pictures import encoded
from workflow_scripts.archives import DamagedMember, StoreReader, list_members
from workflow_scripts.io import UserError
from workflow_scripts.scan.image_check import STATUSES
from workflow_scripts.scan.table import ScanSettings, scan_store

PICTURES = [encoded(seed=1, size=(16, 16)), encoded("PNG", seed=2, size=(9, 7)), encoded("GIF", size=(5, 5))]
DATA = st.sampled_from([*PICTURES, PICTURES[0][:200], b"", b"<html>", bytes(300)])
PIECE = st.sampled_from(
    ["a", "b.jpg", "..", ".", "", "é", "e\u0301", "A", "x" * 120, "c:", "~", "\n", "\U0001f600", "__MACOSX"]
)
NAME = st.lists(PIECE, min_size=1, max_size=4).map("/".join) | st.sampled_from(["/etc/passwd", "\\a\\b.jpg"])
# Places where bytes are changed, as shares of the file, and what stands there then.
WRONG = st.sampled_from([b"", b"\0", b"\xff" * 4, b"PK\1\2", b"PK\3\4", b"\0\0\0\x80", b"9" * 12])
EDIT = st.tuples(st.floats(0, 1), WRONG)
EDITS = st.lists(EDIT, max_size=2)
CUT = st.sampled_from([1.0, 1.0, 1.0, 0.9, 0.5])


def damaged(data, edits, cut):
    """Bytes with some replaced, and the end cut off."""
    data = bytearray(data[: int(len(data) * cut)])
    for share, piece in edits:
        at = int(share * len(data))
        data[at : at + len(piece)] = piece
    return bytes(data)


def check(path, kind, folder):
    """Scans and reads; gives the readable members by name."""
    outside = sorted(item for item in folder.parent.iterdir())
    try:
        summary = scan_store(path, kind, folder / "images.parquet", ScanSettings())
        listing = list_members(path, kind)
    except UserError as error:
        assert str(path) in str(error)
        return {}
    rows = pq.read_table(folder / "images.parquet").to_pylist()
    assert summary["images"] == len(rows) == len(listing)
    assert {row["status"] for row in rows} <= set(STATUSES)
    found = {}
    with StoreReader(path, kind) as reader:
        for index, row in enumerate(rows):
            assert not row["name"].startswith("/") and ".." not in row["name"].split("/")
            try:
                found[row["name"]] = reader.read(listing, index, 1 << 20).data
            except DamagedMember:
                assert row["status"] != "ok"
    assert sorted(item for item in folder.parent.iterdir()) == outside
    return found


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    return tmp_path / "inner"


METHODS = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
ZIPPED = st.tuples(NAME, DATA, METHODS, st.sampled_from([0o100644, 0o120777, 0o40755, 0]))


@tries(60, 120, members=st.lists(ZIPPED, max_size=6), comment=st.binary(max_size=30), edits=EDITS, cut=CUT)
def test_zips(folder, members, comment, edits, cut):
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as file:
        warnings.simplefilter("ignore")  # equal names
        for name, data, method, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, method
            file.writestr(info, data)
        file.comment = comment
    path = folder / "a.zip"
    path.write_bytes(damaged(stream.getvalue(), edits, cut))
    found = check(path, "zip", folder)
    if not edits and cut == 1.0:
        assert set(found.values()) <= {data for _, data, _, _ in members}


TYPES = st.sampled_from(
    [
        tarfile.REGTYPE,
        tarfile.REGTYPE,
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.DIRTYPE,
        tarfile.CHRTYPE,
        tarfile.FIFOTYPE,
        b"S",
        b"z",
    ]
)
TARRED = st.tuples(NAME, DATA, TYPES, NAME)
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])


@tries(60, 120, members=st.lists(TARRED, max_size=6), format=FORMATS, edits=EDITS, cut=CUT)
def test_tars(folder, members, format, edits, cut):
    stream, written = io.BytesIO(), []
    with tarfile.open(fileobj=stream, mode="w", format=format) as file:
        for name, data, kind, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(data) if kind == tarfile.REGTYPE else 0
            try:
                file.addfile(info, io.BytesIO(data))
                written.append(data)
            except (ValueError, UnicodeError):  # a name that this format does not take
                continue
    path = folder / "a.tar"
    path.write_bytes(damaged(stream.getvalue(), edits, cut))
    found = check(path, "tar", folder)
    if not edits and cut == 1.0:
        assert set(found.values()) <= {*written, b""}


KINDS = st.sampled_from(["file", "file", "file", "link out", "link in", "fifo", "loop"])


@tries(30, 50, members=st.lists(st.tuples(NAME, DATA, KINDS), max_size=6))
def test_folders(tmp_path_factory, members):
    top = tmp_path_factory.mktemp("folders")
    folder, images = top / "inner", top / "inner/images"
    images.mkdir(parents=True)
    (top / "secret.jpg").write_bytes(b"secret")
    for name, data, kind in members:
        path = images / name.strip("/")
        if ".." in name or not path.is_relative_to(images) or os.path.lexists(path):
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            match kind:
                case "file":
                    path.write_bytes(data)
                case "link out":
                    path.symlink_to(top / "secret.jpg")
                case "link in":
                    path.symlink_to("b.jpg")
                case "fifo":
                    os.mkfifo(path)
                case "loop":
                    path.symlink_to(images)
        except OSError:  # the name is taken, or too long
            continue
    found = check(images, "folder", folder)
    assert set(found.values()) <= {*(data for _, data, _ in members), b"secret"}
