"""Decoding: what is accepted, what is refused, and that the fast path gives the same pixels."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from llava_ext.data import images
from llava_ext.data.images import ImageError, ImagePreprocessor, decode
from tests.support.models import picture

MEAN = STD = (0.5, 0.5, 0.5)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_decode_to_pillows_pixels(mode):
    data = encoded(picture(1).convert(mode), "JPEG", quality=90)
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(image.convert("RGB"))
    assert (np.asarray(decode(data)) == wanted).all()


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP"])
def test_the_suffix_does_not_matter(kind, tmp_path):
    path = tmp_path / "wrong.jpg"
    path.write_bytes(encoded(picture(1), kind))
    assert decode(path).size == picture(1).size


def test_cut_files_are_refused_or_filled():
    image = picture(1).resize((128, 96))
    data = encoded(image, "JPEG")
    cut = data[: len(data) // 2]
    with pytest.raises(ImageError, match="not a readable image"):
        decode(cut)
    tolerant = decode(cut, tolerant=True)
    assert tolerant.size == image.size
    assert (np.asarray(tolerant)[:8] == np.asarray(decode(data))[:8]).all()
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize(
    "data", [b"", b"<html>not found</html>", b"\xff\xd8\xff\xe0junk", b"\x89PNG\r\n\x1a\nshort"]
)
def test_what_is_no_image_is_refused_even_when_tolerant(data):
    for tolerant in (False, True):
        with pytest.raises(ImageError):
            decode(data, tolerant=tolerant)


def test_without_simplejpeg_pillow_decodes(monkeypatch):
    data = encoded(picture(1), "JPEG")
    fast = np.asarray(decode(data))
    monkeypatch.setattr(images, "simplejpeg", None)
    assert (np.asarray(decode(data)) == fast).all()


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (56, 56), (200, 31), (33, 500), (1, 1), (2, 3)])
def test_padding_first_and_resizing_rows_first_are_the_same(size):
    """The reference pads to a square, then resizes; ours resizes rows of landscape pictures before
    padding.
    """
    image = picture(3).resize(size)
    side, colour = max(size), tuple(int(value * 255) for value in MEAN)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    wanted = np.asarray(square.resize((56, 56), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert (ImagePreprocessor(56, MEAN, STD, "pad").uint8(image).numpy() == wanted).all()


def test_unknown_aspect_ratios_are_refused():
    with pytest.raises(ImageError, match="allowed are pad, square"):
        ImagePreprocessor(56, MEAN, STD, "anyres")
