"""Says whether a file's bytes are a whole, undamaged image.

JPEGs are decoded by libjpeg-turbo in strict mode, gray and at 1/8 size: the entropy data, where damage shows,
are read in full, the rest of the work is skipped, and libjpeg's warnings, which Pillow drops, become errors.
Damage that by chance gives other valid codes shows in no decoder, only in a CRC or hash.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, replace
from typing import Literal

import simplejpeg
from PIL import Image, ImageFile

Status = Literal["ok", "truncated", "corrupt", "suspect", "not_an_image", "empty", "too_large"]
STATUSES: tuple[Status, ...] = ("ok", "truncated", "corrupt", "suspect", "not_an_image", "empty", "too_large")
MAX_PIXELS = 178_956_970
"""Pillow refuses images of more pixels as decompression bombs."""
MAX_BYTES = 512 << 20
"""No image file of a training set is larger."""

SUFFIX_FORMATS = {
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "jpe": "JPEG",
    "jfif": "JPEG",
    "png": "PNG",
    "gif": "GIF",
    "webp": "WEBP",
    "bmp": "BMP",
    "tif": "TIFF",
    "tiff": "TIFF",
}
_OTHERS = (
    (b"%PDF", "a PDF file"),
    (b"PK\3\4", "a zip file"),
    (b"\x1f\x8b", "gzip data"),
    (b"{", "JSON text"),
    (b"<?xml", "an XML file"),
    (b"<svg", "an SVG drawing"),
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was never fetched"),
)


NOTES = ("sixteen_bit", "float", "rotated")
"""Whole pictures that training sees otherwise than viewers show them, because it decodes as LLaVA does."""
_NOTED_MODES = dict.fromkeys(("I;16", "I;16B", "I;16L", "I"), "sixteen_bit") | {"F": "float"}
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Verdict:
    """What is known about one file; ``note`` is one of NOTES or empty."""

    status: Status
    format: str = ""
    width: int = 0
    height: int = 0
    detail: str = ""
    note: str = ""


def sniff(data: bytes) -> str:
    """The image format by the first bytes, empty when it is none that Pillow and libjpeg read everywhere."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "TIFF"
    if data[:2] == b"BM" and len(data) >= 26 and data[6:10] == b"\0\0\0\0":
        return "BMP"
    return ""


def describe(data: bytes) -> str:
    """What a file that is no image seems to be."""
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n")
    lower = head.lower()
    if lower.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page, probably an error page of the server that it was fetched from"
    for magic, what in _OTHERS:
        if lower.startswith(magic.lower()):
            return what
    if not data.strip(b"\0"):
        return "only zero bytes"
    return f"begins with {data[:8].hex(' ')}"


def wrong_suffix(name: str, format: str) -> bool:
    """True when the name promises another format than the bytes are."""
    promised = SUFFIX_FORMATS.get(name.rsplit(".", 1)[-1].lower()) if "." in name else None
    return bool(format) and promised is not None and promised != format


def check(data: bytes, max_pixels: int = MAX_PIXELS) -> Verdict:
    """Decodes ``data`` as far as needed to know that it is a whole image. Never raises."""
    if not data:
        return Verdict("empty", detail="0 bytes")
    format = sniff(data)
    if format == "JPEG":
        return check_jpeg(data, max_pixels)
    verdict = check_with_pillow(data, max_pixels, format)
    if not format and verdict.status != "ok":
        return Verdict("not_an_image", detail=describe(data))
    return verdict


def check_jpeg(data: bytes, max_pixels: int = MAX_PIXELS) -> Verdict:
    """Strict decode at 1/8 size; what libjpeg says is kept as the detail."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        if width * height > max_pixels:
            return _too_large("JPEG", width, height, max_pixels)
        simplejpeg.decode_jpeg(
            data, "GRAY", fastdct=True, fastupsample=True, min_height=1, min_width=1, min_factor=8
        )
    except Exception as error:  # noqa: BLE001  on hostile bytes simplejpeg raises more than it documents
        message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return _classify_jpeg(data, message, max_pixels)
    return Verdict("ok", "JPEG", width, height, *_rotation_of(data))


def _rotation_of(data: bytes) -> tuple[str, str]:
    """Detail and note of a JPEG that Pillow has not opened yet; its EXIF block, if any, stands near its
    beginning.
    """
    if data.find(b"Exif\0\0", 0, 1 << 16) < 0:
        return "", ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                return _note(image)
    except Exception:  # noqa: BLE001  Pillow's plugins raise anything on hostile bytes
        return "", ""


def _note(image: Image.Image) -> tuple[str, str]:
    """What training sees of a picture that is no plain 8-bit one, or is to be turned; and the note's name."""
    if note := _NOTED_MODES.get(image.mode):
        levels = image.convert("RGB").convert("L").histogram()
        white, black = levels[255] / sum(levels), levels[0] / sum(levels)
        seen = f"values are cut to 0..255, which makes {white:.0%} of it white and {black:.0%} black"
        return f"mode {image.mode}: {seen}", note
    turn = image.getexif().get(_ORIENTATION, 1)
    if turn in range(2, 9):
        return f"EXIF orientation {turn}: seen as it is stored, neither turned nor mirrored", "rotated"
    return "", ""


def _classify_jpeg(data: bytes, message: str, max_pixels: int) -> Verdict:
    pillow = check_with_pillow(data, max_pixels, "JPEG")
    lower = message.lower()
    if pillow.status == "too_large":
        return pillow
    if "premature end of jpeg file" in lower or pillow.status == "truncated":
        return replace(pillow, status="truncated", format="JPEG", detail=message, note="")
    if pillow.status == "ok" and "extraneous bytes before marker 0xd9" in lower:
        return replace(pillow, status="suspect", detail=message, note="")
    if pillow.status == "ok" and _is_unsupported(lower):
        return replace(pillow, detail=f"{message}; Pillow reads it; {pillow.detail}".removesuffix("; "))
    return replace(pillow, status="corrupt", format="JPEG", detail=message, note="")


def _is_unsupported(message: str) -> bool:
    """libjpeg-turbo's simple interface knows only common kinds of JPEG; others are left to Pillow."""
    return "subsampling" in message or "unsupported" in message or "colorspace" in message


def check_with_pillow(data: bytes, max_pixels: int = MAX_PIXELS, format: str = "") -> Verdict:
    """A full decode with Pillow; PNGs also have every chunk's CRC and their end verified."""
    width, height, seen = 0, 0, ("", "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                format, (width, height) = image.format or format, image.size
                if width * height > max_pixels:
                    return _too_large(format, width, height, max_pixels)
                image.load()
                seen = _note(image)
            if format == "PNG":
                with Image.open(io.BytesIO(data)) as image:
                    image.verify()
    except Image.DecompressionBombError as error:  # only where prepare_process() was not called
        return Verdict("too_large", format, detail=str(error))
    except MemoryError:
        return Verdict("too_large", format, width, height, "there is not enough memory to decode it")
    except Exception as error:  # noqa: BLE001  Pillow's plugins raise anything on hostile bytes
        status: Status = "truncated" if _ends_early(data, format, str(error)) else "corrupt"
        return Verdict(status, format, width, height, f"{type(error).__name__}: {error}"[:300])
    return Verdict("ok", format, width, height, *seen)


def _ends_early(data: bytes, format: str, message: str) -> bool:
    if format == "PNG":
        return b"IEND" not in data[-64:]
    if format == "WEBP":
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    return "truncated" in message.lower() or "end of file" in message.lower()


def _too_large(format: str, width: int, height: int, max_pixels: int) -> Verdict:
    return Verdict(
        "too_large", format, width, height, f"{width} x {height} pixels, more than the limit of {max_pixels}"
    )


def prepare_process() -> None:
    """Pillow's own limit would only warn, from several threads at once; ours is checked before decoding."""
    Image.MAX_IMAGE_PIXELS = None
    ImageFile.LOAD_TRUNCATED_IMAGES = False
