"""The demo's data: the same bytes every time, answers that are true, damage that real decoders find."""

import hashlib
import io
import json
from collections import Counter

import numpy as np
import pytest
import simplejpeg
from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError

from tests.support.demo import load_json, members, pixels
from workflow_scripts.config.shapes import ShapesSource
from workflow_scripts.demo import shapes


def tree(folder):
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("archive", ["zip", "tar", "folder"])
@pytest.mark.parametrize("split", ["captions", "questions", "test"])
def test_equal_specs_give_equal_bytes(tmp_path, archive, split):
    spec = ShapesSource(
        split=split, pictures=25, archive=archive, seed=4, damage={"truncated": 2, "corrupt": 2}
    )
    for name in ("a", "b"):
        shapes.generate(spec, tmp_path / name)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    shapes.generate(spec.model_copy(update={"seed": 5}), tmp_path / "c")
    changed = tree(tmp_path / "c")
    assert all(changed[name] != digest for name, digest in tree(tmp_path / "a").items() if name in changed)


def test_the_archive_does_not_change_the_pictures(tmp_path):
    found = []
    for archive in ("zip", "tar", "folder"):
        spec = ShapesSource(split="test", pictures=20, archive=archive, seed=1)
        found.append(members(tmp_path / archive, shapes.generate(spec, tmp_path / archive)["images"]))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 20


def colour_of(pixel):
    return min(shapes.COLOURS, key=lambda name: np.abs(np.array(shapes.COLOURS[name]) - pixel).sum())


def test_answers_are_true(tmp_path):
    """Place and colour are read from the pixels, without the generator's help."""
    spec = ShapesSource(split="test", pictures=60, archive="zip", seed=9)
    pictures = members(tmp_path, shapes.generate(spec, tmp_path)["images"])
    checked = Counter()
    for record in load_json(tmp_path / "test.json"):
        kind, answer = record["question_type"], record["conversations"][1]["value"]
        if kind not in ("where", "colour"):
            continue
        picture = pixels(pictures[record["image"].removeprefix("shapes/")])
        background = np.median(picture.reshape(-1, 3), axis=0)
        drawn = np.abs(picture - background).sum(-1) > 90
        rows, columns = np.nonzero(drawn)
        place = f"{'top' if rows.mean() < 28 else 'bottom'} {'left' if columns.mean() < 28 else 'right'}"
        found = {"where": place, "colour": colour_of(np.median(picture[drawn], axis=0))}[kind]
        assert found == answer, record
        checked[kind] += 1
    assert checked["where"] == checked["colour"] == 48


def test_a_scene_with_two_shapes_is_only_asked_about_its_number(tmp_path):
    shapes.generate(
        ShapesSource(split="questions", pictures=50, archive="zip", two_shapes_share=1.0), tmp_path
    )
    for record in load_json(tmp_path / "questions.json"):
        assert [turn["value"] for turn in record["conversations"]] == [
            "<image>\nHow many shapes are there?",
            "two",
        ]


def test_guessing_the_number_gives_one_half_in_the_held_out_questions(tmp_path):
    shapes.generate(ShapesSource(split="test", pictures=100, archive="zip"), tmp_path)
    answers = Counter(
        record["conversations"][1]["value"]
        for record in load_json(tmp_path / "test.json")
        if record["question_type"] == "count"
    )
    assert answers == {"one": 20, "two": 20}


def test_the_held_out_questions_have_their_types_and_training_data_do_not(tmp_path):
    shapes.generate(ShapesSource(split="test", pictures=40, archive="zip"), tmp_path)
    shapes.generate(ShapesSource(split="captions", pictures=40, archive="zip"), tmp_path)
    assert {record["question_type"] for record in load_json(tmp_path / "test.json")} == set(shapes.CHANCE)
    assert all(
        record.keys() == {"id", "image", "conversations"} for record in load_json(tmp_path / "captions.json")
    )


def test_splits_and_seeds_do_not_share_pictures(tmp_path):
    found = {}
    for split in ("captions", "questions", "test"):
        folder = tmp_path / split
        found[split] = set(
            members(
                folder, shapes.generate(ShapesSource(split=split, pictures=80), folder)["images"]
            ).values()
        )
    assert not found["test"] & (found["captions"] | found["questions"])


# ---- damage ----


def of_kind(damaged, kind):
    spec, folder, made = damaged
    rows = [row for row in load_json(folder / "damaged.json") if row["damage"] == kind]
    assert len(rows) == spec.damage.counts()[kind]
    return rows, members(folder, made["images"])


def test_the_ledger_names_every_damaged_picture_and_its_records(damaged):
    spec, folder, _ = damaged
    ledger = load_json(folder / "damaged.json")
    assert Counter(row["damage"] for row in ledger) == spec.damage.counts()
    records = {record["id"]: record for record in load_json(folder / "questions.json")}
    for row in ledger:
        assert [records[name]["image"] for name in row["records"]] == [row["image"]]


def test_all_other_pictures_are_whole(damaged):
    _, folder, made = damaged
    bad = {row["member"] for row in load_json(folder / "damaged.json")}
    good = [data for name, data in members(folder, made["images"]).items() if name not in bad]
    assert len(good) == 100
    for data in good:
        assert simplejpeg.decode_jpeg(data, strict=True).shape == (56, 56, 3)


def test_truncated_files_stop_in_the_middle_of_their_data(damaged):
    rows, files = of_kind(damaged, "truncated")
    for row in rows:
        with pytest.raises(ValueError, match=r"[Pp]remature end"):
            simplejpeg.decode_jpeg(files[row["member"]], strict=True)
        with pytest.raises(OSError, match="truncated"):
            Image.open(io.BytesIO(files[row["member"]])).load()


def test_corrupt_files_look_whole_to_pillow_but_not_to_a_strict_decoder(damaged):
    rows, files = of_kind(damaged, "corrupt")
    for row in rows:
        data = files[row["member"]]
        assert data.endswith(b"\xff\xd9")
        Image.open(io.BytesIO(data)).load()
        with pytest.raises(ValueError, match="Corrupt JPEG data"):
            simplejpeg.decode_jpeg(data, strict=True)


@pytest.mark.parametrize(("kind", "form"), [("gif_as_jpg", "GIF"), ("png_as_jpg", "PNG")])
def test_files_with_a_wrong_suffix_are_whole_pictures(damaged, kind, form):
    rows, files = of_kind(damaged, kind)
    for row in rows:
        picture = Image.open(io.BytesIO(files[row["member"]]))
        picture.load()
        assert (picture.format, picture.size, row["member"][-4:]) == (form, (56, 56), ".jpg")


def test_error_pages_and_empty_files_are_no_pictures(damaged):
    for kind in ("html_as_jpg", "empty"):
        rows, files = of_kind(damaged, kind)
        for row in rows:
            with pytest.raises(UnidentifiedImageError):
                Image.open(io.BytesIO(files[row["member"]]))
    assert all(files[row["member"]] == b"" for row in rows)


def test_missing_pictures_have_records_but_no_file(damaged):
    rows, files = of_kind(damaged, "missing")
    assert all(row["member"] not in files and row["records"] for row in rows)


def test_the_scan_calls_each_damage_by_its_name(damaged, tmp_path):
    """The real scan on the real archive: every picture gets the ledger's status, every other one `ok`."""
    import pyarrow.parquet as pq

    from workflow_scripts.scan import step as scan

    _, folder, made = damaged
    source, manifest = folder / "manifest.json", tmp_path / "scan" / "manifest.json"
    source.write_text(json.dumps({"name": "damaged", "kind": "shapes", "digest": "x", "files": [], **made}))
    scan.main(["--source", str(source), "--manifest", str(manifest)])
    expected = {
        row["member"]: row for row in load_json(folder / "damaged.json") if row["damage"] != "missing"
    }
    table = pq.read_table(manifest.with_name("images.parquet")).to_pylist()
    assert len(table) == 117
    for row in table:
        wanted = expected.get(row["name"], {"expected_status": "ok", "wrong_suffix": False})
        assert (row["status"], row["wrong_suffix"]) == (wanted["expected_status"], wanted["wrong_suffix"]), (
            row
        )


# ---- failures ----


@pytest.mark.parametrize("archive", ["zip", "tar", "folder"])
def test_a_failure_in_the_middle_leaves_the_old_files(tmp_path, monkeypatch, archive):
    spec = ShapesSource(split="captions", pictures=12, archive=archive, seed=1)
    shapes.generate(spec, tmp_path)
    before = tree(tmp_path)
    real = shapes.draw_scene
    calls = iter(range(100))

    def dies(scene, rng, size):
        if next(calls) == 7:
            raise OSError("No space left on device")
        return real(scene, rng, size)

    monkeypatch.setattr(shapes, "draw_scene", dies)
    with pytest.raises(OSError, match="No space"):
        shapes.generate(spec.model_copy(update={"seed": 2}), tmp_path)
    now = {name: digest for name, digest in tree(tmp_path).items() if not name.startswith(".")}
    assert now == before


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"split": "captions", "pictures": 3, "damage": {"empty": 4}},
            "4 pictures are to be damaged, but pictures is 3",
        ),
        ({"split": "captions", "pictures": 3, "text_only": 1}, "split: questions"),
        ({"split": "captions", "pictures": 0}, "greater than or equal to 1"),
        ({"split": "captions", "pictures": 3, "damage": {"emtpy": 1}}, "emtpy"),
        ({"split": "pictures", "pictures": 3}, "captions"),
    ],
)
def test_impossible_specs_say_what_is_wrong(values, words):
    with pytest.raises(ValidationError, match=words):
        ShapesSource.model_validate(values)


def test_the_command_line_answers_a_wrong_spec_without_a_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        shapes.main(["--spec", '{"split": "captions"}', "--folder", str(tmp_path)])
    assert "pictures" in capsys.readouterr().err
