"""Draws the demo's data: pictures of coloured shapes, LLaVA-format annotations, and damage on purpose.

A picture shows one shape (of 4 shapes, 6 colours, in one of 4 quadrants; size, place, shade and background
vary) or two shapes, which are only asked about their number. Tiny models learn to read such pictures in a
minute; pictures that need matching ('where is the red one?') they do not.

Everything follows from the spec: equal specs give equal bytes, archives included.
"""

from __future__ import annotations

import io
import json
import math
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from llava_ext.files import atomic_path, write_text
from workflow_scripts.command_line import command_line, read_spec
from workflow_scripts.config.shapes import ShapesSource
from workflow_scripts.io import progress, user_errors, write_json

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (214, 48, 49),
    "green": (39, 150, 70),
    "blue": (45, 90, 210),
    "yellow": (240, 205, 45),
    "purple": (145, 65, 190),
    "orange": (242, 130, 36),
}
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("one", "two")
CHANCE = {"where": 1 / 4, "shape": 1 / 4, "colour": 1 / 6, "count": 1 / 2}

PHRASES = {
    "where": ("Where is the shape?", "In which corner is the shape?"),
    "shape": ("Which shape is it?", "What is the shape called?"),
    "colour": ("Which colour is it?", "What is the colour of the shape?"),
    "count": ("How many shapes are there?",),
}
QUESTION_CYCLE = ("where", "shape", "colour", "count", "where")
CAPTIONS = (
    "a {colour} {shape} at the {quadrant}",
    "at the {quadrant} there is a {colour} {shape}",
    "one {shape}, {colour}, at the {quadrant}",
)
TWO_SHAPES = "two shapes"
TEXT_ONLY = (
    ("How many corners has a triangle?", "three"),
    ("How many corners has a square?", "four"),
    ("How many corners has a circle?", "none"),
    ("Is red a colour or a shape?", "a colour"),
    ("Is a star a colour or a shape?", "a shape"),
)
HTML = (
    b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head>\n<body><h1>Not Found</h1>\n"
    b"<p>The requested picture was not found on this server.</p></body></html>\n"
)
# What a scan should call each kind of damage; None where the file is a valid image with a wrong suffix.
EXPECTED_STATUS = {
    "truncated": "truncated",
    "corrupt": "corrupt",
    "gif_as_jpg": "ok",
    "png_as_jpg": "ok",
    "html_as_jpg": "not_an_image",
    "empty": "empty",
    "missing": "missing",
}
OVERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One drawn shape."""

    shape: str
    colour: str
    quadrant: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one thing, or two in different quadrants."""

    things: tuple[Thing, ...]

    def answer(self, question_type: str) -> str:
        """The right answer; everything but `count` is only defined for one thing."""
        if question_type == "count":
            return NUMBERS[len(self.things) - 1]
        (thing,) = self.things
        return {"where": thing.quadrant, "shape": thing.shape, "colour": thing.colour}[question_type]


def random_scene(rng: random.Random, two: bool) -> Scene:
    """One or two things, each attribute drawn uniformly and independently."""
    quadrants = rng.sample(QUADRANTS, 2 if two else 1)
    return Scene(tuple(Thing(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), place) for place in quadrants))


def polygon(
    centre: tuple[float, float], radius: float, count: int, inner: float = 1.0
) -> list[tuple[float, float]]:
    """The corners of a regular polygon that stands upright; ``inner`` < 1 pulls every second one in: a
    star.
    """
    points = []
    for i in range(count):
        angle = 2 * math.pi * i / count - math.pi / 2
        length = radius * (inner if i % 2 else 1.0)
        points.append((centre[0] + length * math.cos(angle), centre[1] + length * math.sin(angle)))
    return points


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, rng: random.Random, side: int) -> None:
    """Draws into a canvas of ``side`` pixels, with random size, place and shade, inside the thing's
    quadrant.
    """
    half = side / 2
    radius = half * rng.uniform(0.34, 0.46)
    row, column = thing.quadrant.split()
    x = rng.uniform(radius, half - radius) + (half if column == "right" else 0)
    y = rng.uniform(radius, half - radius) + (half if row == "bottom" else 0)
    shade = rng.uniform(0.85, 1.12)
    red, green, blue = (
        min(255, round(level * shade) + rng.randint(-8, 8)) for level in COLOURS[thing.colour]
    )
    fill = (max(0, red), max(0, green), max(0, blue))
    if thing.shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif thing.shape == "square":
        edge = radius * 0.86
        draw.rectangle((x - edge, y - edge, x + edge, y + edge), fill=fill)
    elif thing.shape == "triangle":
        draw.polygon(polygon((x, y), radius * 1.05, 3), fill=fill)
    else:
        draw.polygon(polygon((x, y), radius * 1.1, 10, inner=0.42), fill=fill)


def draw_scene(scene: Scene, rng: random.Random, size: int) -> Image.Image:
    """An RGB picture of ``size`` x ``size`` pixels on a light, slightly tinted background."""
    grey = rng.randint(205, 248)
    back = tuple(min(255, grey + rng.randint(-6, 6)) for _ in range(3))
    side = size * OVERSAMPLING
    canvas = Image.new("RGB", (side, side), back)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw_thing(draw, thing, rng, side)
    return canvas.reduce(OVERSAMPLING)


def encode(picture: Image.Image, form: str) -> bytes:
    """The picture's file bytes; ``form`` is JPEG, GIF or PNG."""
    stream = io.BytesIO()
    options: dict[str, Any] = {"quality": 92, "subsampling": 0} if form == "JPEG" else {}
    picture.save(stream, form, **options)
    return stream.getvalue()


def _entropy_start(jpeg: bytes) -> int:
    """Where the entropy-coded data begin: behind the start-of-scan segment's header."""
    scan = jpeg.index(b"\xff\xda")
    return scan + 2 + int.from_bytes(jpeg[scan + 2 : scan + 4], "big")


def truncate(jpeg: bytes) -> bytes:
    """The first half of a JPEG's data: what an interrupted download leaves."""
    start = _entropy_start(jpeg)
    return jpeg[: start + (len(jpeg) - start) // 2]


def corrupt(jpeg: bytes, rng: random.Random) -> bytes:
    """A JPEG of the same length with a few bytes overwritten so that libjpeg notices.

    Most flipped bits of entropy-coded data decode to something else without any complaint, which no decoder
    can find; so places are tried until the strict decoder names damaged data.
    """
    import simplejpeg

    start, end = _entropy_start(jpeg), len(jpeg) - 2
    for _ in range(200):
        damaged = bytearray(jpeg)
        place = rng.randrange(start, end - 12)
        for offset in range(8):
            damaged[place + offset] ^= rng.randrange(1, 256)
        try:
            simplejpeg.decode_jpeg(bytes(damaged), strict=True)
        except ValueError as error:
            message = str(error).lower()
            if "corrupt jpeg data" in message and "extraneous" not in message:
                return bytes(damaged)
    raise AssertionError("no place found where overwritten bytes make libjpeg warn")


def _stored_bytes(picture: Image.Image, damage: str | None, rng: random.Random) -> bytes | None:
    """What lies in the archive for a picture; None when its file is missing."""
    makers: dict[str | None, Callable[[], bytes | None]] = {
        None: lambda: encode(picture, "JPEG"),
        "truncated": lambda: truncate(encode(picture, "JPEG")),
        "corrupt": lambda: corrupt(encode(picture, "JPEG"), rng),
        "gif_as_jpg": lambda: encode(picture, "GIF"),
        "png_as_jpg": lambda: encode(picture, "PNG"),
        "html_as_jpg": lambda: HTML,
        "empty": lambda: b"",
        "missing": lambda: None,
    }
    return makers[damage]()


def _turns(pairs: Sequence[tuple[str, str]], image: bool) -> list[dict[str, str]]:
    """Questions and answers as LLaVA's conversation; the picture comes before the first question."""
    turns = []
    for i, (question, answer) in enumerate(pairs):
        text = f"<image>\n{question}" if image and i == 0 else question
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return turns


def _caption_records(name: str, image: str, scene: Scene, rng: random.Random) -> list[dict[str, Any]]:
    caption = TWO_SHAPES
    if len(scene.things) == 1:
        thing = scene.things[0]
        caption = rng.choice(CAPTIONS).format(shape=thing.shape, colour=thing.colour, quadrant=thing.quadrant)
    return [{"id": name, "image": image, "conversations": _turns([("Describe the picture.", caption)], True)}]


def _question_kinds(rng: random.Random, turns: int) -> list[str]:
    """Question types of a one-shape picture's turns.

    The place takes longest to learn, so it is asked about twice in five turns, and first in half of the
    pictures and more.
    """
    kinds = [QUESTION_CYCLE[i % len(QUESTION_CYCLE)] for i in range(turns)]
    rng.shuffle(kinds)
    if rng.random() < 0.5 and "where" in kinds:
        kinds.remove("where")
        kinds.insert(0, "where")
    return kinds


def _question_records(
    name: str, image: str, scene: Scene, rng: random.Random, turns: int
) -> list[dict[str, Any]]:
    kinds = _question_kinds(rng, turns) if len(scene.things) == 1 else ["count"]
    pairs = [(rng.choice(PHRASES[kind]), scene.answer(kind)) for kind in kinds]
    return [{"id": name, "image": image, "conversations": _turns(pairs, True)}]


def _test_records(
    name: str, image: str, scene: Scene, rng: random.Random, count: bool
) -> list[dict[str, Any]]:
    """One record a question; ``count`` says whether a one-shape picture is asked about the number too."""
    kinds = ["count"] if len(scene.things) == 2 else ["where", "shape", "colour"] + ["count"] * count
    return [
        {
            "id": f"{name}_{kind}",
            "image": image,
            "question_type": kind,
            "conversations": _turns([(rng.choice(PHRASES[kind]), scene.answer(kind))], True),
        }
        for kind in kinds
    ]


@dataclass(frozen=True)
class _Drawn:
    """One picture of a source: where it lies, its bytes (None: missing), its records, its damage."""

    member: str
    data: bytes | None
    records: list[dict[str, Any]]
    ledger: dict[str, Any] | None


def _names(spec: ShapesSource, index: int) -> tuple[str, str]:
    """(name inside the archive, `image` in the annotation), laid out as in LLaVA's own two data sets."""
    name = f"{spec.split}_{index:06d}.jpg"
    if spec.split == "captions":
        return f"{index // 1000:05d}/{name}", f"{index // 1000:05d}/{name}"
    folder = "train" if spec.split == "questions" else "test"
    return f"{folder}/{name}", f"shapes/{folder}/{name}"


def _plan(spec: ShapesSource) -> tuple[dict[int, str], set[int], set[int]]:
    """(damage by picture, pictures with two shapes, one-shape pictures whose number is asked in a test)."""
    rng = random.Random(f"plan {spec.split} {spec.seed}")
    wanted = [kind for kind, count in spec.damage.counts().items() for _ in range(count)]
    damaged = dict(zip(rng.sample(range(spec.pictures), len(wanted)), wanted, strict=True))
    two = set(rng.sample(range(spec.pictures), round(spec.pictures * spec.two_shapes_share)))
    one = sorted(set(range(spec.pictures)) - two)
    # As many one-shape as two-shape pictures are asked about their number: guessing gives one half.
    return damaged, two, set(rng.sample(one, min(len(one), len(two))))


def _draw_all(spec: ShapesSource) -> Iterator[_Drawn]:
    damaged, two, counted = _plan(spec)
    for index in range(spec.pictures):
        rng = random.Random(f"{spec.split} {spec.seed} {index}")
        scene = random_scene(rng, index in two)
        data = _stored_bytes(draw_scene(scene, rng, spec.image_size), damaged.get(index), rng)
        member, image = _names(spec, index)
        name = Path(member).stem
        if spec.split == "captions":
            records = _caption_records(name, image, scene, rng)
        elif spec.split == "questions":
            records = _question_records(name, image, scene, rng, spec.turns)
        else:
            records = _test_records(name, image, scene, rng, index in counted)
        yield _Drawn(member, data, records, _ledger_row(member, image, damaged.get(index), records))


def _ledger_row(
    member: str, image: str, damage: str | None, records: list[dict[str, Any]]
) -> dict[str, Any] | None:
    if damage is None:
        return None
    return {
        "member": member,
        "image": image,
        "damage": damage,
        "expected_status": EXPECTED_STATUS[damage],
        "wrong_suffix": damage in ("gif_as_jpg", "png_as_jpg"),
        "records": [record["id"] for record in records],
    }


def _text_only_records(spec: ShapesSource) -> list[dict[str, Any]]:
    rng = random.Random(f"text {spec.seed}")
    return [
        {"id": f"text_{i:06d}", "conversations": _turns(rng.sample(TEXT_ONLY, 2), False)}
        for i in range(spec.text_only)
    ]


def _write_zip(path: Path, files: Iterator[tuple[str, bytes]]) -> None:
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files:
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            archive.writestr(info, data)


def _write_tar(path: Path, files: Iterator[tuple[str, bytes]]) -> None:
    with atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _write_folder(path: Path, files: Iterator[tuple[str, bytes]]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, data in files:
        target = temporary / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


WRITERS = {
    "zip": ("images.zip", _write_zip),
    "tar": ("images.tar", _write_tar),
    "folder": ("images", _write_folder),
}


def _lines(records: list[dict[str, Any]]) -> str:
    """A JSON array with one record a line, as LLaVA's own files can be read by people."""
    return "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n"


def generate(spec: ShapesSource, folder: Path) -> dict[str, Any]:
    """Draws a source into ``folder`` and returns the part of its manifest that says what lies where.

    Writes the archive (or folder) of pictures, `<split>.json` in LLaVA's format and `damaged.json`, the
    ledger of what was damaged on purpose. Each file is whole or absent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    ledger: list[dict[str, Any]] = []

    def files() -> Iterator[tuple[str, bytes]]:
        for drawn in progress(_draw_all(spec), spec.pictures, f"drawing {spec.split}"):
            records.extend(drawn.records)
            if drawn.ledger is not None:
                ledger.append(drawn.ledger)
            if drawn.data is not None:
                yield drawn.member, drawn.data

    archive_name, write = WRITERS[spec.archive]
    write(folder / archive_name, files())
    records += _text_only_records(spec)
    write_json(folder / "damaged.json", ledger)
    write_text(folder / f"{spec.split}.json", _lines(records))
    return {
        "images": {"type": spec.archive, "path": archive_name},
        "annotations": [{"path": f"{spec.split}.json", "role": "annotations"}],
    }


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Draws one source from the command line and prints what lies where."""
    texts = {"spec": 'the source\'s spec as JSON, e.g. \'{"split": "test", "pictures": 20}\''}
    options = command_line("demo.shapes", __doc__, texts, {"folder": "where the files go"}).parse_args(argv)
    print(json.dumps(generate(read_spec(ShapesSource, options.spec), options.folder), indent=2))


if __name__ == "__main__":
    main()
