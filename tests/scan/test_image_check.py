"""The check of one image: everything that a full decode would show, nothing that is in order."""

from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from llava_ext.data.images import decode
from tests.support.damage import (
    NO_IMAGES,
    damaged_jpegs,
    damaged_others,
    jpeg,
    jpeg_that_claims,
    png_header,
    whole_files,
)
from tests.support.pictures import encoded, file_of, picture, seen_otherwise
from workflow_scripts.scan.image_check import check, describe, sniff, wrong_suffix

SEEDS = range(12)


@pytest.fixture(autouse=True)
def _as_in_a_scan(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)


@pytest.mark.parametrize(("name", "data"), list(whole_files()), ids=lambda v: v if isinstance(v, str) else "")
def test_whole_files_are_ok(name, data):
    verdict = check(data)
    assert verdict.status == "ok", verdict
    with Image.open(io.BytesIO(data)) as image:
        assert (verdict.format, verdict.width, verdict.height) == (image.format, *image.size)
    assert not wrong_suffix(name, verdict.format)


def test_no_false_alarm_on_many_pictures():
    wrong = {
        name: check(data) for seed in SEEDS for name, data in whole_files(seed) if check(data).status != "ok"
    }
    assert not wrong


def libjpeg_complains(data):
    """The reference: libjpeg's own errors and warnings in a decode of full size."""
    try:
        simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_jpegs_are_found(seed):
    """Everything that a full decode finds. (A zeroed block can give valid codes: then only a CRC knows.)"""
    files = list(damaged_jpegs(seed))
    missed = {kind for kind, data in files if libjpeg_complains(data) and check(data).status == "ok"}
    assert not missed
    assert sum(check(data).status != "ok" for _, data in files) >= len(files) - 3


def test_pillow_alone_misses_most_of_it():
    """Why libjpeg is asked in strict mode."""

    def pillow_notices(data):
        try:
            Image.open(io.BytesIO(data)).load()
        except OSError:
            return True
        return False

    files = [data for seed in SEEDS for _, data in damaged_jpegs(seed) if libjpeg_complains(data)]
    assert sum(map(pillow_notices, files)) < len(files) / 2


@pytest.mark.parametrize("kind", ["cut_in_the_middle", "cut_early", "cut_late", "progressive_cut"])
def test_truncated_files_are_told_from_corrupt_ones(kind):
    [data] = [data for name, data in damaged_jpegs(0) if name == kind]
    verdict = check(data)
    assert verdict.status == "truncated"
    assert verdict.detail


@pytest.mark.parametrize("kind", ["cut_with_a_fake_end", "ff_block", "hole", "restart_lost"])
def test_damage_inside_is_corrupt(kind):
    [data] = [data for name, data in damaged_jpegs(0) if name == kind]
    assert check(data).status == "corrupt"


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_pngs_gifs_and_webps_are_found(seed):
    found = {name: check(data).status for name, data in damaged_others(seed)}
    assert "ok" not in found.values(), found
    assert found["cut.png"] == found["no_end.png"] == found["cut.gif"] == found["cut.webp"] == "truncated"


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_is_named(name):
    verdict = check(NO_IMAGES[name])
    assert verdict.status == "not_an_image"
    expected = {
        "html.jpg": "HTML",
        "json.jpg": "JSON",
        "lfs.jpg": "LFS",
        "zeros.jpg": "zero bytes",
        "pdf.jpg": "PDF",
    }
    assert expected.get(name, "begins with") in verdict.detail


def test_empty():
    assert check(b"").status == "empty"


def test_a_jpeg_that_ends_in_its_header():
    assert check(jpeg(0)[:150]).status == "truncated"


@pytest.mark.parametrize(
    "data", [png_header(100_000, 100_000), jpeg_that_claims(60_000, 60_000)], ids=["png", "jpeg"]
)
def test_bombs_are_too_large_and_never_decoded(data):
    verdict = check(data)
    assert verdict.status == "too_large"
    assert verdict.width * verdict.height > 178_956_970


def test_the_limit_of_pixels_can_be_set():
    assert check(encoded(size=(100, 100)), max_pixels=9999).status == "too_large"
    assert check(encoded(size=(100, 100)), max_pixels=10_000).status == "ok"


def test_padding_before_the_end_is_suspect_not_corrupt():
    """Some cameras write extra bytes before the end marker: harmless, but nobody can be sure."""
    data = jpeg(0)
    verdict = check(data[:-2] + b"\x12\x34\x56\x78" + data[-2:])
    assert verdict.status == "suspect"
    assert "extraneous bytes" in verdict.detail


def test_gif_and_png_bytes_under_a_jpg_name_are_whole_images():
    for format in ("GIF", "PNG"):
        verdict = check(encoded(format))
        assert verdict.status == "ok"
        assert wrong_suffix("a.jpg", verdict.format)
    assert not wrong_suffix("a.JPEG", "JPEG")
    assert not wrong_suffix("a", "PNG")


def test_sniffing_and_describing_never_fail_on_short_input():
    for length in range(20):
        for data in (
            b"\xff" * length,
            b"RIFF" + b"x" * length,
            b"GIF89a"[:length],
            b"\x89PNG\r\n\x1a\n"[:length],
        ):
            sniff(data)
            describe(data)
            check(data)


@pytest.mark.parametrize(("name", "file"), seen_otherwise().items(), ids=seen_otherwise())
def test_whole_pictures_that_training_sees_otherwise_are_named_with_what_it_sees(name, file):
    data, note = file
    verdict = check(data)
    assert (verdict.status, verdict.note) == ("ok", note)
    seen = np.asarray(decode(data))
    if note == "rotated":
        with Image.open(io.BytesIO(data)) as image:
            assert ImageOps.exif_transpose(image).size == seen.shape[:2] == (48, 64)
        assert verdict.detail == "EXIF orientation 6: seen as it is stored, neither turned nor mirrored"
    else:
        shares = f"{(seen == 255).all(2).mean():.0%} of it white and {(seen == 0).all(2).mean():.0%} black"
        assert shares in verdict.detail


def test_what_a_training_sees_as_viewers_do_has_no_note():
    upright, colours = Image.Exif(), np.zeros((48, 64, 3), np.uint8)
    upright[0x0112] = 1
    files = [file_of(picture(), "JPEG", exif=upright), file_of(Image.fromarray(colours), "PNG")]
    assert [check(data).note for data in files] == ["", ""]
    # Pillow itself turns a TIFF when it decodes it.
    turned = Image.Exif()
    turned[0x0112] = 6
    data = file_of(picture(), "TIFF", exif=turned)
    assert check(data).note == "" and decode(data).size == (48, 64)


def test_damaged_exif_is_no_damage_of_the_picture():
    data = file_of(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert (check(data).status, check(data).note) == ("ok", "")
