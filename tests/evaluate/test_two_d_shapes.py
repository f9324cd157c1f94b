"""2DS: every answer is checked against the drawn picture, by colours and places alone, and no question has
two.
"""

import io
import json
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from workflow_scripts.acquire.step import main as acquire
from workflow_scripts.config.two_d_shapes import TwoDShapesSource
from workflow_scripts.evaluate.questions import first_pictures
from workflow_scripts.evaluate.tasks import TASKS
from workflow_scripts.evaluate.two_d_shapes import (
    CHANCE,
    COLOURS,
    MARGIN,
    SIDES,
    STRATA,
    TOWARDS,
    generate,
    make_scene,
    records_of,
)
from workflow_scripts.io import UserError, write_json


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A small source, made by the acquire step: (folder, table, {name: picture})."""
    folder = tmp_path_factory.mktemp("2ds")
    spec = json.dumps({"kind": "two_d_shapes", "pictures": 40, "seed": 7, "image_size": 168})
    acquire(["--name", "2ds", "--spec", spec, "--manifest", str(folder / "manifest.json")])
    with zipfile.ZipFile(folder / "images.zip") as archive:
        pictures = {
            name: Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in archive.namelist()
        }
    return folder, pd.read_parquet(folder / "questions.parquet"), pictures


def seen(picture):
    """Where each colour lies in a picture: its centre, in shares of the side."""
    pixels = np.asarray(picture).astype(int)
    found = {}
    for name, colour in COLOURS.items():
        rows, columns = np.nonzero((abs(pixels - colour) < 12).all(axis=-1))
        if len(rows) > 30:
            found[name] = (
                (columns.min() + columns.max()) / 2 / len(pixels),
                (rows.min() + rows.max()) / 2 / len(pixels),
            )
    return found


def by_colour(text, shapes):
    """The colour of the thing that words like `red object`, `red star` or `star` name."""
    for colour, shape in shapes.items():
        if colour in text.split() or (shape in text.split() and not set(text.split()) & set(COLOURS)):
            return colour
    raise AssertionError(text)


def test_every_answer_is_what_the_picture_shows(drawn):
    _, table, pictures = drawn
    checked = 0
    for row in table.to_dict("records"):
        places = seen(pictures[row["image_filename"]])
        shapes = {thing["color"]: thing["shape"] for thing in row["objects"]}
        assert places.keys() == shapes.keys()
        for pair in row["qa_pairs"]:
            checked += check(pair, places, shapes)
    assert checked == 40 * 6


def check(pair, places, shapes):
    text = pair["question"]
    absolute = re.fullmatch(r"What ([a-z ]+) is the object (?:at|on) the (\w+)\?", text)
    if absolute:
        axis, sign = SIDES[absolute[2]]
        order = sorted(places, key=lambda name: -sign * places[name][axis])
        assert abs(places[order[0]][axis] - places[order[1]][axis]) > 0.6 * MARGIN
        colour, shape = order[0], shapes[order[0]]
        answers = {"color": colour, "shape": shape, "color and shape": f"{colour} {shape}"}
        assert pair["answer"] == answers[absolute[1]]
        return 1
    relative = re.fullmatch(rf"Is the (.+) ({'|'.join(TOWARDS.values())}) the (.+)\?", text)
    side = next(side for side, words in TOWARDS.items() if words == relative[2])
    axis, sign = SIDES[side]
    first, second = (places[by_colour(relative[place], shapes)] for place in (1, 3))
    assert abs(first[axis] - second[axis]) > 0.6 * MARGIN
    assert pair["answer"] == ("yes" if sign * (first[axis] - second[axis]) > 0 else "no")
    return 1


def test_the_default_has_500_questions_a_stratum_and_none_is_easy_to_guess():
    spec = TwoDShapesSource()
    scenes = [make_scene(index, spec.seed) for index in range(spec.pictures)]
    questions = [question for scene in scenes for question in scene.questions]
    assert Counter(question.stratum for question in questions) == dict.fromkeys(STRATA, 500)
    for stratum in STRATA:
        answers = Counter(question.answer for question in questions if question.stratum == stratum)
        assert answers.most_common(1)[0][1] / 500 < CHANCE[stratum] + 0.06
        if stratum.endswith("relative"):
            assert answers == {"yes": 250, "no": 250}
    assert {len(scene.things) for scene in scenes} == {2, 3, 4, 5, 6}
    for scene in scenes:
        assert len({thing.colour for thing in scene.things}) == len(scene.things)
        assert len({thing.shape for thing in scene.things}) == len(scene.things)


def test_equal_specs_give_equal_bytes_and_another_seed_others(tmp_path):
    hashes = [
        [
            file["sha256"]
            for file in generate(TwoDShapesSource(pictures=3, seed=seed), tmp_path / name)["files"]
        ]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert hashes[0] == hashes[1]
    assert not set(hashes[0]) & set(hashes[2])


def test_the_evaluation_reads_its_questions(drawn):
    questions = first_pictures(TASKS["shapes"].read(drawn[0] / "manifest.json", None), 10)
    assert len(questions) == 60 and {question.type for question in questions} == set(STRATA)


def test_a_published_table_is_read_like_a_drawn_one(drawn):
    folder, table, _ = drawn
    assert records_of(table) == json.loads((folder / "test.json").read_text())
    with pytest.raises(UserError, match="no column 'qa_pairs'"):
        records_of(table.drop(columns="qa_pairs"))
    with pytest.raises(UserError, match="'000000' has no questions"):
        records_of(table.assign(qa_pairs=[[]] * len(table)))


def test_pictures_can_lie_in_a_folder(tmp_path):
    found = generate(TwoDShapesSource(pictures=2, archive="folder"), tmp_path)
    assert len(list(Path(tmp_path / found["images"]["path"]).glob("*.png"))) == 2


def test_the_published_parquet_gives_the_same_questions(drawn):
    """As the hub has it: the parquet as a file of the source, read by kind: two_d_shapes."""
    source = drawn[0] / "manifest.json"
    ours, published = (TASKS[kind].read(source, None) for kind in ("shapes", "two_d_shapes"))
    assert published == ours
    with TASKS["two_d_shapes"].pictures(source, None, published[:1]) as picture:
        assert picture(published[0].image).startswith(b"\x89PNG")


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "2ds.parquet").write_bytes(b"PAR1 and no more")
    write_json(tmp_path / "manifest.json", {"files": [{"path": "2ds.parquet"}]})
    with pytest.raises(UserError, match="a table can't be read as parquet"):
        TASKS["two_d_shapes"].read(tmp_path / "manifest.json", None)
