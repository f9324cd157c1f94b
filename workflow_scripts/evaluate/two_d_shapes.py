"""Draws 2DS, the paper's benchmark of spatial questions, and reads it, drawn here or published.

A row of the table is a picture: `entry_id`, `test_category`, `image_filename`, `objects` and `qa_pairs`, a
list of `question`, `answer`, `qa_category`. Six strata: {colour, shape, both} x {absolute, relative}, one
question each a picture. Within a picture all colours and all shapes differ, and whatever a question turns on
is so by a margin that can be seen, so no question has two answers. Half of the relative questions of each
stratum are answered by yes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image, ImageDraw

from llava_ext.files import atomic_path, write_text
from workflow_scripts.acquire.local_files import describe_file, describe_folder
from workflow_scripts.config.two_d_shapes import TwoDShapesSource
from workflow_scripts.demo.shapes import WRITERS, encode, polygon
from workflow_scripts.io import UserError, progress

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "green": (42, 157, 70),
    "blue": (38, 84, 214),
    "yellow": (244, 208, 40),
    "orange": (243, 132, 24),
    "purple": (130, 60, 170),
    "brown": (120, 72, 40),
    "black": (24, 24, 24),
}
BACKGROUND = (250, 250, 250)
# axis (0: x, 1: y) and sign of what lies at, or towards, a side; y grows downwards
SIDES = {"top": (1, -1), "bottom": (1, 1), "left": (0, -1), "right": (0, 1)}
TOWARDS = {"top": "above", "bottom": "below", "left": "to the left of", "right": "to the right of"}
SUBJECTS = ("color", "shape", "shape_color")
KINDS = ("absolute", "relative")
STRATA = tuple(f"{subject}_{kind}" for subject in SUBJECTS for kind in KINDS)
# Chance of a guess, by stratum.
CHANCE = {
    name: (
        {"color_absolute": 1 / len(COLOURS), "shape_absolute": 1 / len(SHAPES)}.get(
            name, 0.5 if name.endswith("relative") else 1 / (len(COLOURS) * len(SHAPES))
        )
    )
    for name in STRATA
}
MARGIN = 0.1  # shares of the picture's side
RADIUS = 0.075
OVERSAMPLING = 3
COLUMNS = ("entry_id", "test_category", "image_filename", "objects", "qa_pairs")


@dataclass(frozen=True)
class Thing:
    """A shape with the place of its centre, in shares of the picture's side: (0, 0) is the top left
    corner.
    """

    shape: str
    colour: str
    x: float
    y: float

    def place(self, axis: int) -> float:
        """x or y."""
        return self.y if axis else self.x

    def named(self, subject: str) -> str:
        """How a question calls it."""
        names = {"color": f"{self.colour} object", "shape": self.shape}
        return names.get(subject, f"{self.colour} {self.shape}")


@dataclass(frozen=True)
class Question:
    """One question with its only right answer."""

    stratum: str
    text: str
    answer: str


# ---- scenes ---------------------------------------------------------------------------------------------


def random_things(rng: random.Random) -> list[Thing]:
    """2 to 6 things with different colours and shapes, none touching another or the edge."""
    number = rng.randint(2, 6)
    shapes, colours = rng.sample(SHAPES, number), rng.sample(list(COLOURS), number)
    places: list[tuple[float, float]] = []
    while len(places) < number:
        x, y = (rng.uniform(1.2 * RADIUS, 1 - 1.2 * RADIUS) for _ in range(2))
        if all((x - left) ** 2 + (y - top) ** 2 > (2.6 * RADIUS) ** 2 for left, top in places):
            places.append((x, y))
    return [Thing(shape, colour, x, y) for shape, colour, (x, y) in zip(shapes, colours, places, strict=True)]


def outermost(things: Sequence[Thing], side: str) -> Thing | None:
    """The thing at a side, or None where two are about equally far out."""
    axis, sign = SIDES[side]
    first, second = sorted(things, key=lambda thing: -sign * thing.place(axis))[:2]
    return first if sign * (first.place(axis) - second.place(axis)) >= MARGIN else None


def lies_on_side(first: Thing, side: str, second: Thing) -> bool | None:
    """Whether ``first`` lies on that side of ``second``; None where they are about level."""
    axis, sign = SIDES[side]
    distance = sign * (first.place(axis) - second.place(axis))
    return None if abs(distance) < MARGIN else distance > 0


def ask(things: Sequence[Thing], stratum: str, side: str, yes: bool, rng: random.Random) -> Question | None:
    """A question of a stratum about a side, answered by yes where it can be and ``yes`` is set; None if
    there is none.
    """
    subject, kind = stratum.rsplit("_", 1)
    return (
        _absolute(things, subject, side) if kind == "absolute" else _relative(things, subject, side, yes, rng)
    )


def _absolute(things: Sequence[Thing], subject: str, side: str) -> Question | None:
    thing = outermost(things, side)
    if thing is None:
        return None
    where = f"at the {side}" if side in ("top", "bottom") else f"on the {side}"
    asked = {"color": ("color", thing.colour), "shape": ("shape", thing.shape)}
    what, answer = asked.get(subject, ("color and shape", f"{thing.colour} {thing.shape}"))
    return Question(f"{subject}_absolute", f"What {what} is the object {where}?", answer)


def _relative(
    things: Sequence[Thing], subject: str, side: str, yes: bool, rng: random.Random
) -> Question | None:
    pairs = [pair for pair in combinations(things, 2) if lies_on_side(pair[0], side, pair[1]) is not None]
    if not pairs:
        return None
    first, second = rng.choice(pairs)
    if lies_on_side(first, side, second) != yes:
        first, second = second, first
    text = f"Is the {first.named(subject)} {TOWARDS[side]} the {second.named(subject)}?"
    return Question(f"{subject}_relative", text, "yes" if yes else "no")


@dataclass(frozen=True)
class Scene:
    """A picture's things and its questions, one of each stratum."""

    name: str
    things: tuple[Thing, ...]
    questions: tuple[Question, ...]


def make_scene(index: int, seed: int) -> Scene:
    """The scene of that number; sides and answers take turns, so that none is commoner than another."""
    rng = random.Random(f"2ds {seed} {index}")
    sides = [list(SIDES)[(index + place) % len(SIDES)] for place in range(len(STRATA))]
    yes = [bool((index + index // len(SIDES) + place) % 2) for place in range(len(STRATA))]
    while True:
        things = random_things(rng)
        asked = [ask(things, *wanted, rng) for wanted in zip(STRATA, sides, yes, strict=True)]
        found = tuple(question for question in asked if question is not None)
        if len(found) == len(STRATA):
            return Scene(f"{index:06d}", tuple(things), found)


# ---- pictures -------------------------------------------------------------------------------------------


def draw_scene(scene: Scene, size: int) -> Image.Image:
    """An RGB picture of ``size`` x ``size`` pixels."""
    side = size * OVERSAMPLING
    canvas = Image.new("RGB", (side, side), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw_thing(draw, thing, side)
    return canvas.reduce(OVERSAMPLING)


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
    x, y, radius, fill = thing.x * side, thing.y * side, RADIUS * side, COLOURS[thing.colour]
    if thing.shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif thing.shape == "square":
        edge = 0.86 * radius
        draw.rectangle((x - edge, y - edge, x + edge, y + edge), fill=fill)
    elif thing.shape == "cross":
        arm = 0.34 * radius
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
    else:
        corners, inner = {"triangle": (3, 1.0), "diamond": (4, 1.0), "star": (10, 0.42)}[thing.shape]
        draw.polygon(polygon((x, y), 1.1 * radius, corners, inner), fill=fill)


# ---- files ----------------------------------------------------------------------------------------------


def row_of(scene: Scene) -> dict[str, Any]:
    """A scene as a row of the published table."""
    objects = [
        {"shape": thing.shape, "color": thing.colour, "x": round(thing.x, 4), "y": round(thing.y, 4)}
        for thing in scene.things
    ]
    pairs = [{"question": q.text, "answer": q.answer, "qa_category": q.stratum} for q in scene.questions]
    return dict(zip(COLUMNS, (scene.name, "2ds", f"{scene.name}.png", objects, pairs), strict=True))


def records_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """One LLaVA record a question, with its stratum as `question_type`, from a table in the published form.

    Raises:
        UserError: a column is missing, or a picture has no questions.
    """
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise UserError(f"2DS: no column {missing[0]!r}; expected are {', '.join(COLUMNS)}")
    found: list[dict[str, Any]] = []
    for row in table.to_dict("records"):
        pairs = list(row["qa_pairs"])
        if not pairs:
            raise UserError(f"2DS: entry {row['entry_id']!r} has no questions; the table is incomplete")
        found += [_record(row, pair, number) for number, pair in enumerate(pairs)]
    return found


def _record(row: dict[Any, Any], pair: dict[str, Any], number: int) -> dict[str, Any]:
    return {
        "id": f"{row['entry_id']}_{number}",
        "image": row["image_filename"],
        "question_type": pair["qa_category"],
        "conversations": [
            {"from": "human", "value": f"<image>\n{pair['question']}"},
            {"from": "gpt", "value": str(pair["answer"])},
        ],
    }


def generate(spec: TwoDShapesSource, folder: Path) -> dict[str, Any]:
    """Draws a source into ``folder``; returns the content of its manifest.

    Writes the pictures, `questions.parquet` in the published form, and `test.json`, the same questions as
    LLaVA records.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [make_scene(index, spec.seed) for index in range(spec.pictures)]

    def pictures() -> Iterator[tuple[str, bytes]]:
        for scene in progress(scenes, len(scenes), "drawing 2DS"):
            yield f"{scene.name}.png", encode(draw_scene(scene, spec.image_size), "PNG")

    name, write = WRITERS[spec.archive]
    write(folder / name, pictures())
    table = pd.DataFrame([row_of(scene) for scene in scenes])
    with atomic_path(folder / "questions.parquet") as temporary:
        table.to_parquet(temporary, index=False)
    lines = (json.dumps(record) for record in records_of(table))
    write_text(folder / "test.json", "[\n" + ",\n".join(lines) + "\n]\n")
    archive = describe_folder(folder / name, name, content=True) if spec.archive == "folder" else None
    return {
        "images": {"type": spec.archive, "path": name},
        "annotations": [{"path": "test.json", "role": "annotations"}],
        "files": [
            archive or describe_file(folder / name, name),
            *(describe_file(folder / file, file) for file in ("questions.parquet", "test.json")),
        ],
    }
