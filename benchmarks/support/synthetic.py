"""Synthetic data of LLaVA-1.5's counts and shape: archives of tiny images and annotation files.

Archives are written with ``struct`` because ``zipfile`` would take most of the time of the scale test.
"""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

VOCABULARY = (
    "the a of image shows person standing next to red car with blue sky and some trees in background "
    "where small dog is sitting on grass near table that has several cups plates what color how many "
    "answer using single word"
)
WORDS = VOCABULARY.split()


@dataclass(frozen=True)
class Archive:
    """One image source of LLaVA-1.5: members, records that use it, and how names are made."""

    source: str
    prefix: str
    root: str
    kind: str
    members: int
    records: int


PRETRAIN = Archive("llava_pretrain", "", "", "zip", 558_128, 558_128)
INSTRUCT = (
    Archive("coco", "coco/train2017", "train2017", "zip", 118_287, 364_100),
    Archive("gqa", "gqa/images", "images", "zip", 148_854, 72_140),
    Archive("ocr_vqa", "ocr_vqa/images", "ocr_vqa/images", "tar", 207_572, 80_000),
    Archive("textvqa", "textvqa/train_images", "train_images", "zip", 25_119, 21_953),
    Archive("vg_100k", "vg/VG_100K", "VG_100K", "zip", 64_346, 51_000),
    Archive("vg_100k_2", "vg/VG_100K_2", "VG_100K_2", "zip", 43_903, 35_417),
)
TEXT_ONLY = 40_688


def scaled(archive: Archive, scale: float) -> Archive:
    """The same archive with fewer members and records."""
    members, records = max(1, int(archive.members * scale)), max(1, int(archive.records * scale))
    return Archive(archive.source, archive.prefix, archive.root, archive.kind, members, records)


def member_name(archive: Archive, number: int) -> str:
    """Name of a member inside its root folder; LLaVA-Pretrain's are in a thousand folders."""
    if archive.source == "llava_pretrain":
        return f"{number // 1000:05d}/{number:09d}.jpg"
    return f"{number:012d}.jpg"


def inside(archive: Archive, number: int) -> str:
    """The member's whole name."""
    name = member_name(archive, number)
    return f"{archive.root}/{name}" if archive.root else name


def tiny_images(count: int = 16) -> list[bytes]:
    """A few small JPEGs, the same on every machine that has the same libjpeg."""
    images = []
    for seed in range(count):
        stream = io.BytesIO()
        pixels = random.Random(seed).randbytes(64)
        Image.frombytes("L", (8, 8), pixels).save(stream, "JPEG", quality=30)
        images.append(stream.getvalue())
    return images


def truncated(data: bytes) -> bytes:
    """A file without its end."""
    return data[: len(data) - 12]


def members(archive: Archive, images: list[bytes], bad_every: int) -> Iterator[tuple[str, bytes]]:
    """All members; every ``bad_every``-th is truncated."""
    for number in range(archive.members):
        data = images[number % len(images)]
        yield inside(archive, number), truncated(data) if bad_every and number % bad_every == 7 else data


def write_zip(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """A stored zip, zip64 when it needs to be."""
    directory, offset, count = [], 0, 0
    with path.open("wb", buffering=1 << 20) as stream:
        for name, data in files:
            raw, crc, size = name.encode(), zlib.crc32(data), len(data)
            local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0x800, 0, 0, 33, crc, size, size, len(raw), 0)
            stream.write(local + raw + data)
            entry = (b"PK\1\2", 0x314, 20, 0x800, 0, 0, 33, crc, size, size, len(raw), 0, 0, 0, 0, 0x81A40000)
            directory.append(struct.pack("<4s6H3L5H2L", *entry, offset) + raw)
            offset += len(local) + len(raw) + size
            count += 1
        table = b"".join(directory)
        stream.write(table)
        record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(table), offset)
        stream.write(record + struct.pack("<4sLQL", b"PK\6\7", 0, offset + len(table), 1))
        short = min(count, 0xFFFF)
        stream.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, short, short, len(table), offset, 0))


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """A ustar tar."""
    with path.open("wb", buffering=1 << 20) as stream:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            stream.write(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512))
        stream.write(bytes(10240))


def write_archive(archive: Archive, folder: Path, bad_every: int = 0) -> Path:
    """Writes an archive; returns its path."""
    path = folder / f"{archive.source}.{archive.kind}"
    writer = write_zip if archive.kind == "zip" else write_tar
    writer(path, members(archive, tiny_images(), bad_every))
    return path


def text(rng: random.Random, words: int) -> str:
    """Words."""
    return " ".join(rng.choices(WORDS, k=words))


def record(rng: random.Random, number: int, image: str | None, turns: int, words: int) -> str:
    """One LLaVA record as JSON."""
    conversations = []
    for turn in range(turns):
        question = text(rng, max(1, words // 3))
        if turn == 0 and image is not None:
            question = f"<image>\n{question}"
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": text(rng, words)}]
    value: dict[str, object] = {"id": f"{number:012d}", "image": image, "conversations": conversations}
    if image is None:
        del value["image"]
    return json.dumps(value)


def shuffled_numbers(archive: Archive) -> Iterator[int]:
    """Members in an order that jumps through the archive, each used before any is used again."""
    step = next(s for s in (7919, 7907, 7901, 1) if archive.members % s)
    for index in range(archive.records):
        yield (index * step) % archive.members


def write_annotations(path: Path, archives: Iterable[Archive], text_only: int, turns: int, words: int) -> int:
    """A LLaVA JSON array of all records of the archives; returns how many."""
    rng, number = random.Random(0), 0
    # Few different texts are enough: what is measured does not depend on what they say.
    templates = [record(rng, 0, "@image", turns, words) for _ in range(64)]
    without = [record(rng, 0, None, turns, words) for _ in range(16)]
    with path.open("w") as stream:
        stream.write("[")
        for archive in archives:
            for member in shuffled_numbers(archive):
                name = member_name(archive, member)
                image = f"{archive.prefix}/{name}" if archive.prefix else name
                line = (
                    templates[number % 64].replace("@image", image, 1).replace("0" * 12, f"{number:012d}", 1)
                )
                stream.write((", " if number else "") + line)
                number += 1
        for _ in range(text_only):
            line = without[number % 16].replace("0" * 12, f"{number:012d}", 1)
            stream.write((", " if number else "") + line)
            number += 1
        stream.write("]")
    return number
