"""Ways in which image files are damaged, and ways in which they are unusual but whole."""

from __future__ import annotations

import io
import random
import struct
import zlib

from PIL import Image

from tests.support.pictures import encoded, picture


def rough(seed: int, size=(160, 120), mode="RGB") -> Image.Image:
    """A picture with detail everywhere, as photos have."""
    rng = random.Random(seed)
    noise = Image.frombytes("RGB", (40, 30), rng.randbytes(3600)).resize(size, Image.Resampling.BICUBIC)
    return Image.blend(picture(seed, size), noise, 0.5).convert(mode)


def jpeg(seed=0, mode="RGB", size=(160, 120), **options) -> bytes:
    stream = io.BytesIO()
    rough(seed, size, mode).save(stream, "JPEG", **({"quality": 85} | options))
    return stream.getvalue()


def scan_start(data: bytes) -> int:
    at = data.rfind(b"\xff\xda")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def middle(data: bytes, share=0.5) -> int:
    start = scan_start(data)
    return start + int((len(data) - 2 - start) * share)


def overwrite(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


# whole files
# ------------------------------------------------------------------------------------------------------


def whole_files(seed=0):
    """(name, bytes) of files that are in order, however unusual."""
    plain = jpeg(seed)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "x" * 500
    yield "plain.jpg", plain
    yield "progressive.jpg", jpeg(seed, progressive=True)
    yield "gray.jpg", jpeg(seed, "L")
    yield "cmyk.jpg", jpeg(seed, "CMYK")
    yield "exif.jpg", jpeg(seed, exif=exif)
    yield "trailing.jpg", plain + b"trailing bytes of some camera" * 20
    yield "zeros_behind.jpg", plain + bytes(300)
    yield "restart.jpg", jpeg(seed, restart_marker_blocks=4)
    yield "s444.jpg", jpeg(seed, subsampling=0)
    yield "s422.jpg", jpeg(seed, subsampling=1)
    yield "s420.jpg", jpeg(seed, subsampling=2)
    yield "q1.jpg", jpeg(seed, quality=1)
    yield "q100.jpg", jpeg(seed, quality=100, optimize=True)
    yield "icc.jpg", jpeg(seed, icc_profile=b"\0" * 3000)
    for side in ((1, 1), (1, 200), (7, 9), (16, 16), (17, 33)):
        yield f"{side[0]}x{side[1]}.jpg", jpeg(seed, size=side)
    yield "plain.png", encoded("PNG", seed)
    yield "gray.png", encoded("PNG", seed, mode="L")
    yield "palette.png", encoded("PNG", seed, mode="P")
    yield "alpha.png", encoded("PNG", seed, mode="RGBA")
    yield "plain.gif", encoded("GIF", seed)
    yield "plain.webp", encoded("WEBP", seed)
    yield "lossless.webp", encoded("WEBP", seed, lossless=True)
    yield "plain.bmp", encoded("BMP", seed)
    yield "plain.tiff", encoded("TIFF", seed)


# damaged files
# ----------------------------------------------------------------------------------------------------


def damaged_jpegs(seed=0):
    """(kind, bytes) of JPEG files in which something is broken."""
    data, rng = jpeg(seed), random.Random(seed)
    progressive, restart = jpeg(seed, progressive=True), jpeg(seed, restart_marker_blocks=4)
    at = middle(data)
    yield "cut_in_the_middle", data[:at]
    yield "cut_early", data[: middle(data, 0.05)]
    yield "cut_late", data[: middle(data, 0.95)]
    yield "cut_with_a_fake_end", data[:at] + b"\xff\xd9"
    yield "cut_and_zeros_behind", data[:at] + bytes(len(data) - at)
    yield "progressive_cut", progressive[: len(progressive) * 2 // 3]
    yield "zeroed_block", overwrite(data, at, bytes(400))
    yield "random_block", overwrite(data, at, rng.randbytes(400))
    yield "foreign_block", overwrite(data, at, jpeg(seed + 1)[at : at + 400])
    yield "hole", data[:at] + data[at + 200 :]
    yield "doubled_block", data[:at] + data[at - 300 : at] + data[at:]
    yield "ff_block", overwrite(data, at, b"\xff" * 64)
    yield "html_inside", overwrite(data, at, b"<html><body>502 Bad Gateway</body></html>" * 4)
    yield "restart_lost", restart.replace(b"\xff\xd3", b"\x00\x00")


def damaged_others(seed=0):
    """(name, bytes) of PNG, GIF and WebP files that are broken."""
    png, gif, webp = encoded("PNG", seed), encoded("GIF", seed), encoded("WEBP", seed)
    yield "cut.png", png[: len(png) // 2]
    yield "no_end.png", png[:-12]
    yield "flipped.png", overwrite(png, len(png) // 2, bytes([png[len(png) // 2] ^ 0x55]))
    yield "cut.gif", gif[: len(gif) // 2]
    yield "cut.webp", webp[: len(webp) // 2]


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has almost no data: a decompression bomb in miniature."""

    def chunk(kind, body):
        return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def jpeg_that_claims(width: int, height: int) -> bytes:
    """A JPEG whose frame header was given another size."""
    data = jpeg(0)
    at = data.find(b"\xff\xc0")
    return overwrite(data, at + 5, struct.pack(">HH", height, width))


NO_IMAGES = {
    "html.jpg": b"<!DOCTYPE html><html><title>404</title></html>",
    "json.jpg": b'{"error": "rate limited"}',
    "lfs.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "zeros.jpg": bytes(5000),
    "pdf.jpg": b"%PDF-1.4\n...",
    "text.jpg": b"hello",
    "beheaded.jpg": jpeg(0)[200:],
}
