"""Fixtures of the data tests: servers with faults, small images."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path

import pytest
from PIL import Image
from servers import HubServer, Server

from workflow_scripts.download import Patience

# The scale test uses the benchmarks' data.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture
def server():
    with Server().running() as running:
        yield running


@pytest.fixture
def other_server():
    with Server().running() as running:
        yield running


@pytest.fixture
def hub():
    with HubServer().running() as running:
        yield running


@pytest.fixture
def patience():
    """Short pauses; the real ones are the same code with larger numbers."""
    return Patience(attempts=3, backoff_s=0.01, max_backoff_s=0.05, connect_s=2, read_s=0.5)


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
