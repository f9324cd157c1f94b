"""Random damage: whatever the bytes, there is an answer or a message, never a traceback, and never wrong
data.
"""

from __future__ import annotations

import json
import random
import tarfile
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_ext.data.json_records import JsonRecordsError, iterate_records
from tests.archives.test_archives import make_tar, make_zip
from tests.support.damage import jpeg
from tests.support.pictures import encoded
from workflow_scripts.archives import DamagedMember, StoreReader, list_members
from workflow_scripts.io import UserError
from workflow_scripts.scan.image_check import STATUSES, check

ROUNDS = 400
MEMBERS = {f"d/{i}.jpg": encoded(seed=i, size=(16, 16)) for i in range(6)}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, a piece cut out, doubled or zeroed."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randrange(len(data)), rng.randint(1, 40)
        match rng.randrange(5):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length]
            case 3:
                data[at : at + length] = bytes(min(length, len(data) - at))
            case _:
                data[at : at + 4] = rng.choice([b"\xff" * 4, b"PK\1\2", b"PK\5\6", b"\0\0\0\x80"])
        if not data:
            return b""
    return bytes(data)


def read_all(path, kind):
    """Names and content as far as they can be had; complaints are fine, anything else is an error."""
    listing = list_members(path, kind)
    found = {}
    with StoreReader(path, kind) as reader:
        for row, name in enumerate(listing.names):
            try:
                piece = reader.read(listing, row, 1 << 20)
            except DamagedMember:
                continue
            if listing.crc[row] in (-1, piece.crc):
                found[name] = piece.data
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_mutated_zips(tmp_path, seed, method):
    whole = make_zip(tmp_path / "whole.zip", MEMBERS.items(), method).read_bytes()
    rng, path, survived = random.Random(seed), tmp_path / "a.zip", 0
    for _ in range(ROUNDS // 4):
        path.write_bytes(mutated(whole, rng))
        try:
            found = read_all(path, "zip")
        except UserError:
            continue
        survived += 1
        assert set(found.values()) <= {*MEMBERS.values(), b""}, "a right CRC and other data"
    assert survived


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_mutated_tars(tmp_path, format):
    whole = make_tar(
        tmp_path / "whole.tar", {f"{'n' * 120}/{k}": v for k, v in MEMBERS.items()}.items(), format
    )
    rng, path = random.Random(1), tmp_path / "a.tar"
    data = whole.read_bytes()[: 6 * 4096]
    for _ in range(ROUNDS):
        path.write_bytes(mutated(data, rng))
        try:
            found = read_all(path, "tar")
        except UserError:
            continue
        assert all(".." not in name.split("/") and not name.startswith("/") for name in found)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_mutated_images(format, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    whole = jpeg(0, size=(48, 32)) if format == "JPEG" else encoded(format, size=(24, 16))
    rng = random.Random(2)
    for _ in range(ROUNDS):
        assert check(mutated(whole, rng), 10_000_000).status in STATUSES


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
RECORDS = st.lists(st.dictionaries(st.text(max_size=8), VALUES, min_size=1, max_size=4), max_size=20)


@settings(max_examples=60, deadline=None)
@given(
    records=RECORDS, indent=st.sampled_from([None, 0, 3]), window=st.integers(16, 400), ascii=st.booleans()
)
def test_any_json_array_is_split_into_its_records(tmp_path_factory, records, indent, window, ascii):
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_text(
        json.dumps(records, indent=indent, ensure_ascii=ascii), encoding="utf-8", errors="surrogatepass"
    )
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    found = [json.loads(bytes(raw.data)) for raw in iterate_records(path, window)]
    assert found == records


@settings(max_examples=60, deadline=None)
@given(records=RECORDS, seed=st.integers(0, 10**6))
def test_mutated_json_is_read_or_refused_by_name(tmp_path_factory, records, seed):
    path = tmp_path_factory.getbasetemp() / "fuzz2.json"
    path.write_bytes(mutated(json.dumps(records).encode() + b" ", random.Random(seed)))
    try:
        for raw in iterate_records(path, 64):
            json.loads(bytes(raw.data).decode("utf-8", "replace"))
    except JsonRecordsError as error:
        assert "fuzz2.json" in str(error)
