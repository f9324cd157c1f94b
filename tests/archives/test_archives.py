"""Archives as they come, and as somebody with bad intentions makes them."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import warnings
import zipfile
import zlib

import pytest

from tests.support.pictures import encoded, noise
from workflow_scripts.archives import DamagedMember, StoreReader, detect_type, list_members
from workflow_scripts.archives.members import safe_name
from workflow_scripts.io import UserError

JPEG = encoded()


def make_zip(path, members, method=zipfile.ZIP_STORED):
    """The same members make the same archive, at any time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "w", method) as file:
            for name, data in members:
                info = name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name)
                file.writestr(info, data, method)
    return path


def make_tar(path, members, format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=format) as file:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data or b"")
            file.addfile(info, io.BytesIO(data or b""))
    return path


def make_folder(path, members):
    for name, data in members:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


MAKERS = {"zip": make_zip, "tar": make_tar, "folder": make_folder}


def contents(path):
    """All members by name, read by offset; a damaged one is its complaint."""
    listing = list_members(path)
    found = {}
    with StoreReader(path, listing.type) as reader:
        for row, name in enumerate(listing.names):
            try:
                found[name] = reader.read(listing, row, 1 << 30).data
            except DamagedMember as error:
                found[name] = str(error)
    return found, listing


@pytest.mark.parametrize("kind", MAKERS)
def test_members_are_listed_and_read_by_offset(tmp_path, kind):
    members = [(f"train/{i % 3}/{i:04d}.jpg", noise(100 + i, i)) for i in range(50)]
    path = MAKERS[kind](tmp_path / f"a.{kind}", members)
    found, listing = contents(path)
    assert found == dict(members)
    assert listing.type == kind == detect_type(path)


def test_deflated_members(tmp_path):
    members = [(f"{i}.jpg", bytes(1000) + noise(500, i)) for i in range(20)]
    found, listing = contents(make_zip(tmp_path / "a.zip", members, zipfile.ZIP_DEFLATED))
    assert found == dict(members)
    assert set(listing.method.tolist()) == {8}


def test_local_headers_with_longer_extra_fields(tmp_path):
    """The directory's extra field says nothing about the length of the local one."""
    info = zipfile.ZipInfo("a.jpg")
    info.extra = struct.pack("<HH", 0xCAFE, 600) + bytes(600)
    path = make_zip(tmp_path / "a.zip", [(info, JPEG), ("b.jpg", JPEG)])
    assert contents(path)[0] == {"a.jpg": JPEG, "b.jpg": JPEG}


@pytest.mark.parametrize("prefix", [b"", b"#!/bin/sh\n" + b"x" * 1000])
def test_zip64_and_bytes_in_front(tmp_path, prefix):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("a.jpg", "b.jpg"):
            with file.open(name, "w", force_zip64=True) as member:
                member.write(JPEG)
    data = path.read_bytes()
    path.write_bytes(prefix + as_zip64(data))
    assert zipfile.ZipFile(path).namelist() == ["a.jpg", "b.jpg"]
    assert contents(path)[0] == {"a.jpg": JPEG, "b.jpg": JPEG}


def as_zip64(data):
    """Rewrites an archive's end so that every size and offset is in zip64 fields."""
    end = data.rfind(b"PK\5\6")
    entries, _, start = struct.unpack_from("<HLL", data, end + 10)
    directory, at = b"", start
    for _ in range(entries):
        fields = list(struct.unpack_from("<4s6H3L5H2L", data, at))
        name = data[at + 46 : at + 46 + fields[10]]
        extra = struct.pack("<HHQQQ", 1, 24, fields[9], fields[8], fields[16])
        at += 46 + fields[10] + fields[11] + fields[12]
        fields[8] = fields[9] = fields[16] = 0xFFFFFFFF
        fields[11], fields[12] = len(extra), 0
        directory += struct.pack("<4s6H3L5H2L", *fields) + name + extra
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, len(directory), start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, start + len(directory), 1)
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return data[:start] + directory + record + locator + last


def test_more_members_than_sixteen_bits_count(tmp_path):
    members = [(f"{i}.jpg", b"") for i in range(66_000)]
    assert len(list_members(make_zip(tmp_path / "a.zip", members))) == 66_000


BAD_NAMES = ["../out.jpg", "/etc/out.jpg", "a/../../out.jpg", "C:/out.jpg", "a\x07b.jpg", "..\\out.jpg"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_lead_out_are_left_out_and_nothing_is_written(tmp_path, kind):
    inside = tmp_path / "inside"
    inside.mkdir()
    path = MAKERS[kind](inside / "a", [(name, JPEG) for name in [*BAD_NAMES, "good.jpg"]])
    before = sorted(tmp_path.rglob("*"))
    found, listing = contents(path)
    assert found == {"good.jpg": JPEG}
    assert listing.notes["unsafe_name"].count == len(BAD_NAMES)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("raw", "safe"),
    [
        ("a/b.jpg", "a/b.jpg"),
        ("./a//b.jpg", "a/b.jpg"),
        ("a\\b.jpg", "a/b.jpg"),
        ("a/..b.jpg", "a/..b.jpg"),
        ("a/../b.jpg", None),
        ("\\\\host\\share\\b.jpg", None),
        ("bad\udc80.jpg", None),
        ("", None),
    ],
)
def test_safe_names(raw, safe):
    assert safe_name(raw) == safe


def test_links_in_a_zip_are_left_out(tmp_path):
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = 0o120777 << 16
    found, listing = contents(make_zip(tmp_path / "a.zip", [(link, b"/etc/passwd"), ("a.jpg", JPEG)]))
    assert found == {"a.jpg": JPEG}
    assert listing.notes["link"].count == 1


def test_links_in_a_tar(tmp_path):
    """A hard link to a member is that member's data; what points elsewhere is left out."""
    hard, soft, out = (tarfile.TarInfo(name) for name in ("hard.jpg", "soft.jpg", "out.jpg"))
    hard.type, hard.linkname = tarfile.LNKTYPE, "a.jpg"
    soft.type, soft.linkname = tarfile.SYMTYPE, "/etc/passwd"
    out.type, out.linkname = tarfile.LNKTYPE, "../../etc/passwd"
    path = make_tar(tmp_path / "a.tar", [("a.jpg", JPEG), (hard, None), (soft, None), (out, None)])
    found, listing = contents(path)
    assert found == {"a.jpg": JPEG, "hard.jpg": JPEG}
    assert listing.notes["link"].count == 2


def test_links_in_a_folder(tmp_path):
    root = make_folder(tmp_path / "root", [("a.jpg", JPEG)])
    (tmp_path / "secret.jpg").write_bytes(JPEG)
    (root / "inside.jpg").symlink_to("a.jpg")
    (root / "outside.jpg").symlink_to("../secret.jpg")
    (root / "loop").symlink_to(root)
    found, listing = contents(root)
    assert found == {"a.jpg": JPEG, "inside.jpg": JPEG}
    assert listing.notes["link"].count == 2


def test_a_pipe_named_like_an_image_does_not_stop_the_scan(tmp_path):
    root = make_folder(tmp_path / "root", [("a.jpg", JPEG)])
    os.mkfifo(root / "b.jpg")
    assert contents(root)[0] == {"a.jpg": JPEG}


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_the_last_of_equal_names_counts_as_in_extraction(tmp_path, kind):
    path = MAKERS[kind](tmp_path / "a", [("a.jpg", b"old"), ("b.jpg", b"b"), ("a.jpg", b"new")])
    found, listing = contents(path)
    assert found == {"a.jpg": b"new", "b.jpg": b"b"}
    assert listing.notes["duplicate_name"].examples == ["a.jpg"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_some_file_systems_mix_up_stay_apart(tmp_path, kind):
    names = ["A.jpg", "a.jpg", "\u00e9.jpg", "e\u0301.jpg"]
    members = [(name, noise(10, i)) for i, name in enumerate(names)]
    found, listing = contents(MAKERS[kind](tmp_path / "a", members))
    assert found == dict(members)
    assert listing.notes["same_but_for_case_or_unicode_form"].count == 2


def test_encrypted_and_exotic_members_are_named(tmp_path):
    path = make_zip(tmp_path / "a.zip", [("a.jpg", JPEG), ("b.jpg", JPEG), ("c.jpg", JPEG)])
    data = bytearray(path.read_bytes())
    first = data.find(b"PK\1\2")
    second = data.find(b"PK\1\2", first + 4)
    data[first + 8] |= 1
    data[second + 10] = 12
    path.write_bytes(data)
    found, _ = contents(path)
    assert "encrypted" in found["a.jpg"]
    assert "bzip2" in found["b.jpg"]
    assert found["c.jpg"] == JPEG


def test_a_zip_bomb_stays_small(tmp_path):
    """The directory says 100 bytes, the data unpack to 50 MB."""
    path = make_zip(tmp_path / "a.zip", [("a.jpg", bytes(50_000_000))], zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\1\2")
    struct.pack_into("<L", data, at + 24, 100)
    path.write_bytes(data)
    assert "more than the 100 bytes" in contents(path)[0]["a.jpg"]


def test_damaged_deflate_data(tmp_path):
    path = make_zip(tmp_path / "a.zip", [("a.jpg", JPEG * 3)], zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    data[60:90] = b"\xff" * 30
    path.write_bytes(data)
    assert isinstance(contents(path)[0]["a.jpg"], str)


def test_directory_and_local_header_must_agree(tmp_path):
    path = make_zip(tmp_path / "a.zip", [("a.jpg", JPEG), ("b.jpg", noise(100))])
    data = bytearray(path.read_bytes())
    first = data.find(b"PK\1\2")
    second = data.find(b"PK\1\2", first + 4)
    data[second + 42 : second + 46] = bytes(4)  # b.jpg points to a.jpg's data
    path.write_bytes(data)
    assert "another name" in contents(path)[0]["b.jpg"]


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.9, -10])
def test_a_cut_zip_is_refused(tmp_path, keep):
    path = make_zip(tmp_path / "a.zip", [(f"{i}.jpg", JPEG) for i in range(20)])
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match="fetch it again"):
        list_members(path)


def test_a_damaged_central_directory_is_refused(tmp_path):
    path = make_zip(tmp_path / "a.zip", [(f"{i}.jpg", JPEG) for i in range(20)])
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\1\2", data.find(b"PK\1\2") + 200)
    data[at : at + 4] = b"XXXX"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"entry \d+ of 20"):
        list_members(path)


@pytest.mark.parametrize("cut", [100, 513, 700, 5000])
def test_a_cut_tar_is_refused(tmp_path, cut):
    path = make_tar(tmp_path / "a.tar", [(f"{i}.jpg", JPEG) for i in range(20)])
    end = 20 * (512 + -(-len(JPEG) // 512) * 512)
    path.write_bytes(path.read_bytes()[: end - cut])
    with pytest.raises(UserError, match="cut or damaged"):
        list_members(path)


def test_a_tar_with_a_damaged_header_is_refused(tmp_path):
    """The standard library takes it for the end and shows half of the members."""
    path = make_tar(tmp_path / "a.tar", [(f"{i}.jpg", JPEG) for i in range(20)])
    data = bytearray(path.read_bytes())
    step = 512 + -(-len(JPEG) // 512) * 512
    data[10 * step + 150] ^= 0xFF
    path.write_bytes(data)
    with tarfile.open(path) as file:
        assert len(file.getnames()) == 10
    with pytest.raises(UserError, match="header at byte"):
        list_members(path)


def test_a_tar_without_its_end_mark_is_noted(tmp_path):
    path = make_tar(tmp_path / "a.tar", [("a.jpg", bytes(512))])
    path.write_bytes(path.read_bytes()[:1024])
    found, listing = contents(path)
    assert list(found) == ["a.jpg"]
    assert "no_end_mark" in listing.notes


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_tars(tmp_path, format):
    names = ["x" * 150 + "/" + "y" * 120 + ".jpg", "\u6587\u5b57.jpg", "a.jpg"]
    found, _ = contents(make_tar(tmp_path / "a.tar", [(name, JPEG) for name in names], format))
    assert list(found) == names


@pytest.mark.parametrize(
    ("magic", "advice"),
    [(b"\x1f\x8b", "gunzip"), (b"BZh9", "bunzip2"), (b"7z\xbc\xaf", "7z x"), (b"Rar!", "unrar")],
)
def test_compressed_archives_are_refused_with_advice(tmp_path, magic, advice):
    (tmp_path / "a.tar.xx").write_bytes(magic + noise(600))
    with pytest.raises(UserError, match=advice):
        detect_type(tmp_path / "a.tar.xx")


def test_other_files_and_litter_are_counted_not_listed(tmp_path):
    names = ["a.jpg", "README.txt", "__MACOSX/._a.jpg", "x/._b.jpg", "labels.json", "noext"]
    listing = list_members(make_zip(tmp_path / "a.zip", [(name, JPEG) for name in names]))
    assert listing.names == ["a.jpg", "noext"]
    assert listing.others == 4


def test_code_page_names(tmp_path):
    """Old zips have names in code page 437."""
    path = make_zip(tmp_path / "a.zip", [("aXb.jpg", JPEG)])
    path.write_bytes(path.read_bytes().replace(b"aXb.jpg", b"a\x82b.jpg"))
    assert list(contents(path)[0]) == ["a\u00e9b.jpg"]
    assert contents(path)[0]["a\u00e9b.jpg"] == JPEG


def test_crc_is_that_of_the_data(tmp_path):
    path = make_zip(tmp_path / "a.zip", [("a.jpg", JPEG)])
    listing = list_members(path)
    with StoreReader(path, "zip") as reader:
        piece = reader.read(listing, 0, 1 << 20)
    assert piece.crc == zlib.crc32(JPEG) == listing.crc[0]
    assert path.read_bytes()[piece.offset : piece.offset + len(JPEG)] == JPEG
