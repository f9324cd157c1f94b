"""Small images and bytes for the data tests."""

from __future__ import annotations

import io
import random

import numpy as np
from PIL import Image


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that no compression or repetition can hide."""
    return random.Random(seed).randbytes(size)


def picture(seed: int = 0, size: tuple[int, int] = (64, 48), mode: str = "RGB") -> Image.Image:
    """A picture with smooth and rough parts, so that its JPEG has real entropy data."""
    rng = random.Random(seed)
    small = Image.frombytes("RGB", (8, 8), rng.randbytes(192))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(
    format: str = "JPEG", seed: int = 0, size: tuple[int, int] = (64, 48), mode: str = "RGB", **options
) -> bytes:
    """A picture's file."""
    stream = io.BytesIO()
    picture(seed, size, mode).save(stream, format, **options)
    return stream.getvalue()


def file_of(image: Image.Image, format: str, **options) -> bytes:
    """A picture's file."""
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def seen_otherwise() -> dict[str, tuple[bytes, str]]:
    """Whole files that training sees otherwise than viewers show them, with the scan's name for it."""
    levels = np.arange(64 * 48).reshape(48, 64) * 20
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "gray16.png": (file_of(Image.fromarray(levels.astype(np.uint16)), "PNG"), "sixteen_bit"),
        "gray32.tif": (file_of(Image.fromarray(levels.astype(np.int32)), "TIFF"), "sixteen_bit"),
        "share.tif": (file_of(Image.fromarray((levels / 61440).astype(np.float32)), "TIFF"), "float"),
        "turned.jpg": (file_of(picture(), "JPEG", exif=turned), "rotated"),
        "turned.png": (file_of(picture(), "PNG", exif=turned), "rotated"),
        "turned.webp": (file_of(picture(), "WEBP", exif=turned), "rotated"),
    }
