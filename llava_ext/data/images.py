"""Image bytes to pixel values, equal to LLaVA's: `pad` (expand to a square first) or `square` (resize and
centre crop).

Needs Pillow only; JPEGs are decoded by simplejpeg where it is installed, which gives the same pixels sooner.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

try:
    import simplejpeg
except ImportError:  # an optional speed-up
    simplejpeg = None

ASPECT_RATIOS = ("pad", "square")
_TRUNCATED_LOCK = threading.Lock()


class ImageError(ValueError):
    """Bytes that are no readable image, or a preprocessing that is not LLaVA's."""


# -- decoding ---------------------------------------------------------------------------------------------


def decode(data: bytes | str | Path, tolerant: bool = False) -> Image.Image:
    """An image as RGB.

    Args:
        data: the file's bytes, or its path.
        tolerant: accept a file that ends too early and fill the rest with gray, as the authors do for all
            files.

    Raises:
        ImageError: the bytes are no image that Pillow can read, or are cut and ``tolerant`` is False.
    """
    source = data if isinstance(data, bytes) else Path(data).read_bytes()
    fast = None if tolerant else _decode_jpeg(source)
    if fast is not None:
        return fast
    try:
        with _truncated_files(tolerant), Image.open(io.BytesIO(source)) as image:
            return rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = "" if isinstance(data, bytes) else f"{data}: "
        raise ImageError(f"{name}not a readable image ({error}); {len(source)} bytes") from None


def rgb(image: Image.Image) -> Image.Image:
    """Converted to RGB without compositing: transparency is dropped, as in LLaVA, and its traces in
    ``info`` with it.
    """
    converted = image.convert("RGB")
    converted.info.clear()
    return converted


class _truncated_files:
    """Sets Pillow's process-wide switch for cut files while it lasts."""

    def __init__(self, tolerant: bool) -> None:
        self.tolerant = tolerant

    def __enter__(self) -> None:
        _TRUNCATED_LOCK.acquire()
        self.before = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = self.tolerant

    def __exit__(self, *_: object) -> None:
        ImageFile.LOAD_TRUNCATED_IMAGES = self.before
        _TRUNCATED_LOCK.release()


def _decode_jpeg(data: bytes) -> Image.Image | None:
    """The JPEG decoded by simplejpeg, or None when Pillow has to do it (other formats, odd colours,
    damage).
    """
    if simplejpeg is None or not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        return Image.fromarray(simplejpeg.decode_jpeg(data, colorspace="RGB"))
    except ValueError:
        return None


# -- preprocessing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImagePreprocessor:
    """LLaVA's preprocessing for one vision tower.

    Attributes:
        size: side S of the tower's square input in pixels.
        mean, std: per channel, for values in [0, 1].
        aspect_ratio: `pad` fills the shorter side with the mean colour and resizes to S; `square` does what
            the tower's own image processor does, which ``edge`` tells.
        edge: with `square` the shorter side is resized to so many pixels before the middle is cut out, S if
            None; 0 resizes both sides to S without a crop, whatever the proportions (SigLIP).
        resample: Pillow's number of the filter (3: bicubic, as LLaVA's; 2: bilinear, SigLIP 2).
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    aspect_ratio: str = "pad"
    edge: int | None = None
    resample: int = Image.Resampling.BICUBIC

    def __post_init__(self) -> None:
        if self.aspect_ratio not in ASPECT_RATIOS:
            raise ImageError(
                f"image_aspect_ratio: found {self.aspect_ratio!r}; allowed are {', '.join(ASPECT_RATIOS)}"
            )

    @classmethod
    def from_processor(cls, processor: Any, aspect_ratio: str | None = None) -> ImagePreprocessor:
        """From an image processor of transformers (CLIP's, SigLIP's, DINOv2's, LLaVA's).

        Without ``aspect_ratio`` its ``do_pad`` decides.
        """
        read = ["size", "image_mean", "image_std", "resample"]
        read += ["crop_size"] if getattr(processor, "do_center_crop", None) else []
        if unsaid := [name for name in read if getattr(processor, name, None) is None]:
            raise ImageError(
                f"the image processor does not say {', '.join(unsaid)}; preprocessor_config.json has to"
            )
        size = {name: value for name, value in dict(processor.size).items() if value}
        crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", None) else size
        side, edge = crop.get("height"), size.get("shortest_edge", 0)
        squashed = size.get("height") == size.get("width") == side
        if side is None or side != crop.get("width") or not (edge >= side or (not edge and squashed)):
            raise ImageError(
                f"the image processor resizes to {size} and crops to {crop}; a square is expected, and a crop"
                " that is not larger than the shortest edge"
            )
        if aspect_ratio is None:
            aspect_ratio = "pad" if getattr(processor, "do_pad", False) else "square"
        statistics = tuple(processor.image_mean), tuple(processor.image_std)
        return cls(side, *statistics, aspect_ratio, edge=edge, resample=int(processor.resample))

    def __call__(self, image: Image.Image) -> Tensor:
        """Normalised pixel values, float32, (3, S, S)."""
        pixels = self._resized(image)
        table = self.table()
        return torch.from_numpy(np.stack([table[channel][pixels[..., channel]] for channel in range(3)]))

    def uint8(self, image: Image.Image) -> Tensor:
        """The resized pixels before normalisation, uint8, (3, S, S): a quarter of the bytes;
        :func:`normalised` makes the same values of them, wherever they are.
        """
        return torch.from_numpy(np.ascontiguousarray(self._resized(image).transpose(2, 0, 1)))

    def batch(self, images: Sequence[Image.Image]) -> Tensor:
        """(images, 3, S, S)."""
        return torch.stack([self(image) for image in images])

    def table(self) -> np.ndarray:
        """The normalised value of each of the 256 levels, (3, 256): there are no others."""
        levels = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
        mean, std = np.array(self.mean, np.float32)[:, None], np.array(self.std, np.float32)[:, None]
        return ((levels - mean) / std).astype(np.float32)

    def _resized(self, image: Image.Image) -> np.ndarray:
        """uint8 pixels (S, S, 3)."""
        if image.mode != "RGB":
            image = rgb(image)
        fitted = self._padded(image) if self.aspect_ratio == "pad" else self._cropped(image)
        return np.asarray(fitted)

    def _padded(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        side, colour = max(width, height), tuple(int(value * 255) for value in self.mean)
        if width > height:
            # Pillow resizes rows first, each on its own, so rows of padding need not be resized: same result,
            # less work.
            image, width = image.resize((self.size, height), Image.Resampling(self.resample)), self.size
            canvas = Image.new("RGB", (self.size, side), colour)
            canvas.paste(image, (0, (side - height) // 2))
        elif width < height:
            canvas = Image.new("RGB", (side, side), colour)
            canvas.paste(image, ((side - width) // 2, 0))
        else:
            canvas = image
        return canvas.resize((self.size, self.size), Image.Resampling(self.resample))

    def _cropped(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        edge = self.size if self.edge is None else self.edge
        if edge == 0:
            return image.resize((self.size, self.size), Image.Resampling(self.resample))
        short, long = min(width, height), max(width, height)
        longer = int(edge * long / short)
        target = (edge, longer) if width <= height else (longer, edge)
        image = image.resize(target, Image.Resampling(self.resample))
        left, top = (target[0] - self.size) // 2, (target[1] - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))


def normalised(levels: Tensor, table: Tensor) -> Tensor:
    """What the levels (images, 3, S, S), uint8, mean by ``table`` (3, 256): the bits of
    :meth:`ImagePreprocessor.__call__`, on the device of both.
    """
    return torch.stack([table[channel][levels[:, channel].int()] for channel in range(3)], dim=1)
