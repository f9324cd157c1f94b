"""Pixel values of every recorded picture, tower and mode."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_ext.data.images import ImagePreprocessor, decode
from llava_ext.model.folders import load_image_processor

from . import reference

BOUND = 1e-4
# The reference takes an array whose first side is 1 or 3 for channels-first (quirk 18): its pixels are
# garbage, or it raises.
CONFUSED_HEIGHTS = (1, 3)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" in metafunc.fixturenames:
        log = reference.read(reference.folder(metafunc.config) / "images" / "pixel_values_log.json")
        metafunc.parametrize(
            "entry", log, ids=[f"{item['tower']}-{item['mode']}-{item['name']}" for item in log]
        )


def picture(root: Path, name: str) -> Path:
    return root / "images" / f"{name}.png"


def confused(root: Path, entry: dict) -> bool:
    """Whether this is one of the two documented bugs, in which ours is right and the reference is not."""
    width, height = decode(picture(root, entry["name"])).size
    if entry["mode"] == "pad":
        height = max(width, height)
    return height in CONFUSED_HEIGHTS


def test_pixel_values(root, entry, report_difference):
    preprocess = ImagePreprocessor.from_processor(load_image_processor(root / entry["tower"]), entry["mode"])
    image = decode(picture(root, entry["name"]))
    ours = preprocess(image)
    assert ours.shape == (3, preprocess.size, preprocess.size)
    if confused(root, entry):
        assert ours.isfinite().all()
        return
    assert entry["exception"] is None
    recorded = reference.arrays(root / "images" / "pixel_values.npz")[
        f"{entry['tower']}/{entry['mode']}/{entry['name']}"
    ]
    report_difference(f"images/{entry['tower']}/{entry['mode']}", reference.largest(ours, recorded), BOUND)


def test_uint8_pixels_are_the_same_before_normalisation(root, entry):
    preprocess = ImagePreprocessor.from_processor(load_image_processor(root / entry["tower"]), entry["mode"])
    image = decode(picture(root, entry["name"]))
    mean, std = (
        preprocess(image).new_tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std)
    )
    assert ((preprocess.uint8(image) / 255 - mean) / std - preprocess(image)).abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["pad", "square"])
def test_flat_pictures_of_the_ambiguous_heights(root, mode):
    """Where the reference is confused the right result is known for a picture of one colour: that colour,
    and padding.
    """
    from PIL import Image

    tower = reference.read(root / "images" / "pixel_values_log.json")[0]["tower"]
    preprocess = ImagePreprocessor.from_processor(load_image_processor(root / tower), mode)
    for height in CONFUSED_HEIGHTS:
        pixels = preprocess.uint8(Image.new("RGB", (height, height), (10, 200, 30)))
        assert {tuple(pixel) for pixel in pixels.flatten(1).T.tolist()} == {(10, 200, 30)}
