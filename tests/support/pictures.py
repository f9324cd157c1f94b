"""Small images and bytes for the data tests."""

from __future__ import annotations

import io
import random

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
