"""Annotations and scans become a mixture: joins, policies, choices, messages, bytes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llava_ext.data.samples import open_samples
from tests.support.damage import damaged_jpegs, jpeg
from tests.support.mixing import LOOSE, DataFolder, conversation
from tests.support.pictures import encoded
from workflow_scripts.io import UserError, read_json
from workflow_scripts.merge import step as merge

ROOT = Path(__file__).parents[2]
GOOD = {f"{i}.jpg": encoded(seed=i) for i in range(10)}


@pytest.fixture
def folder(tmp_path):
    return DataFolder(tmp_path)


def part(annotations="notes", source="pics", prefix="", policy=None, **more):
    return {
        "annotations": annotations,
        "images": [{"prefix": prefix, "source": source}],
        "policy": policy or {},
        **more,
    }


def simple(folder, kind="zip", count=10, **options):
    folder.images("pics", kind, GOOD)
    folder.annotations("notes", [conversation(f"{i}.jpg", id=i, **options) for i in range(count)])


@pytest.mark.parametrize("kind", ["zip", "tar", "folder"])
def test_a_mixture_is_a_llava_json_whose_images_are_found(folder, kind):
    simple(folder, kind)
    manifest = folder.mix(part())
    records = json.loads((folder.mixture / "samples.json").read_text())
    assert records == [conversation(f"{i}.jpg", id=i) for i in range(10)]
    assert (manifest["records"], manifest["images"], manifest["text_only"]) == (10, 10, 0)
    store = open_samples(folder.mixture)
    assert [store.image_bytes(i) for i in range(10)] == [[GOOD[f"{i}.jpg"]] for i in range(10)]


def test_one_record_a_line_whatever_the_annotations_look_like(folder):
    simple(folder)
    pretty = json.dumps([conversation(f"{i}.jpg", "a\nb \u2028 \u00e9", id=i) for i in range(10)], indent=4)
    folder.annotations("notes", None, text=pretty)
    folder.mix(part())
    lines = (folder.mixture / "samples.json").read_bytes().split(b"\n")
    assert lines[0] == b"["
    assert lines[-2:] == [b"]", b""]
    assert [json.loads(line.rstrip(b","))["id"] for line in lines[1:-2]] == list(range(10))
    store = open_samples(folder.mixture)
    assert store.record(3) == conversation("3.jpg", "a\nb \u2028 \u00e9", id=3)


def test_equal_inputs_give_equal_bytes(folder, tmp_path):
    simple(folder)
    folder.mix(part(samples=7), seed=3)
    first = {path.name: path.read_bytes() for path in folder.mixture.iterdir()}
    command = [sys.executable, "-m", "workflow_scripts.merge", "--name", "M", "--manifest"]
    command += [
        str(folder.mixture / "manifest.json"),
        "--spec",
        json.dumps({"parts": [part(samples=7)], "seed": 3}),
    ]
    command += ["--sources", *map(str, folder.sources), "--scans", *map(str, folder.scans)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    assert {path.name: path.read_bytes() for path in folder.mixture.iterdir()} == first


def test_the_digest_is_about_content_not_about_storage(tmp_path):
    digests = set()
    for kind in ("zip", "tar", "folder"):
        folder = DataFolder(tmp_path / kind)
        folder.path.mkdir()
        simple(folder, kind)
        digests.add(folder.mix(part())["digest"])
    assert len(digests) == 1
    folder.images("pics", "zip", GOOD | {"3.jpg": encoded(seed=33)})
    assert folder.mix(part())["digest"] not in digests


# joins
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["", "images", "deep/er/images"])
@pytest.mark.parametrize("prefix", ["", "coco/train2017"])
def test_the_root_folder_is_found_by_comparing_names(folder, root, prefix):
    folder.images("pics", "zip", {f"{root}/{name}".lstrip("/"): data for name, data in GOOD.items()})
    folder.annotations("notes", [conversation(f"{prefix}/{name}".lstrip("/")) for name in GOOD])
    manifest = folder.mix(part(prefix=prefix))
    assert manifest["parts"][0]["roots"] == [{"prefix": prefix, "source": "pics", "root": root}]
    assert open_samples(folder.mixture).image_bytes(4) == [GOOD["4.jpg"]]


def test_the_root_of_most_images_wins(folder):
    members = {f"a/{n}": d for n, d in GOOD.items()} | {f"b/{n}": encoded(seed=50) for n in list(GOOD)[:4]}
    folder.images("pics", "zip", members)
    folder.annotations("notes", [conversation(name) for name in GOOD])
    folder.mix(part())
    assert open_samples(folder.mixture).image_bytes(0) == [GOOD["0.jpg"]]


def test_prefixes_are_whole_folders_and_the_longest_wins(folder):
    folder.images("one", "zip", {"VG_100K/1.jpg": GOOD["1.jpg"]})
    folder.images("two", "tar", {"VG_100K_2/2.jpg": GOOD["2.jpg"]})
    folder.images("rest", "folder", {"vg/3.jpg": GOOD["3.jpg"]})
    names = ["vg/VG_100K/1.jpg", "vg/VG_100K_2/2.jpg", "vg/3.jpg"]
    folder.annotations("notes", [conversation(name) for name in names])
    images = [
        {"prefix": "", "source": "rest"},
        {"prefix": "vg/VG_100K", "source": "one"},
        {"prefix": "vg/VG_100K_2/", "source": "two"},
    ]
    manifest = folder.mix({"annotations": "notes", "images": images})
    store = open_samples(folder.mixture)
    assert [store.image_bytes(i) for i in range(3)] == [[GOOD[f"{i}.jpg"]] for i in (1, 2, 3)]
    assert [store.source(i) for i in range(3)] == ["one", "two", "rest"]
    assert {name: count["records"] for name, count in manifest["counts"].items()} == {
        "one": 1,
        "two": 1,
        "rest": 1,
    }


@pytest.mark.parametrize(
    ("needed", "member", "mapping", "message"),
    [
        ("x/0.jpg", "x/0.JPG", {}, "in other case"),
        ("x/0.jpg", "x/0.png", {}, "any_suffix: true"),
        ("0.jpg", "images/0.jpg", {"root": "pictures"}, "root: 'images' would find them"),
        ("x/0.jpg", "y/x/0.jpg", {"root": ""}, "root: 'y' would find them"),
        (
            "x/0.jpg",
            "y/0.jpg",
            {},
            "in another folder (change the prefix): x/0.jpg is needed, y/0.jpg is there",
        ),
        ("0.jpg", "other.jpg", {}, "check that pics is the right source"),
    ],
)
def test_a_mapping_that_finds_nothing_is_an_error_with_a_suggestion(folder, needed, member, mapping, message):
    folder.images("pics", "zip", {member: encoded()})
    folder.annotations("notes", [conversation(needed)])
    with pytest.raises(UserError, match="none of the 1 images") as error:
        folder.mix({"annotations": "notes", "images": [{"source": "pics", **mapping}], "policy": LOOSE})
    assert message in str(error.value)


def test_images_that_no_prefix_covers(folder):
    simple(folder)
    folder.annotations("notes", [conversation("0.jpg"), conversation("gqa/images/7.jpg")])
    with pytest.raises(UserError, match=r"add a mapping to `images` for: .*'gqa/images'"):
        folder.mix(part(prefix="0.jpg"))


def test_names_in_another_unicode_form_are_the_same_names(folder):
    """Archives from a Mac write an accent as a character of its own."""
    folder.images("pics", "zip", {"e\u0301.jpg": GOOD["1.jpg"], "a.jpg": GOOD["2.jpg"]})
    folder.annotations("notes", [conversation("\u00e9.jpg"), conversation("a.jpg")])
    folder.mix(part())
    assert open_samples(folder.mixture).image_bytes(0) == [GOOD["1.jpg"]]


def test_any_suffix(folder):
    folder.images("pics", "zip", {"1.gif": encoded("GIF"), "2.jpg": GOOD["2.jpg"]})
    folder.annotations("notes", [conversation("1.jpg"), conversation("2.jpg")])
    with pytest.raises(UserError, match="1 missing"):
        folder.mix(part())
    mapping = {"source": "pics", "any_suffix": True}
    assert folder.mix({"annotations": "notes", "images": [mapping]})["records"] == 2


def test_a_fallback_source_gives_what_the_first_lacks_or_has_damaged(folder):
    folder.images("pics", "zip", {"0.jpg": GOOD["0.jpg"], "1.jpg": jpeg(1)[:-500]})
    folder.images("again", "folder", {f"copy/{i}.jpg": encoded(seed=40 + i) for i in range(3)})
    folder.annotations("notes", [conversation(f"{i}.jpg") for i in range(3)])
    folder.mix({"annotations": "notes", "images": [{"source": "pics"}, {"source": "again"}]})
    store = open_samples(folder.mixture)
    assert [store.image_bytes(i)[0] for i in range(3)] == [GOOD["0.jpg"], encoded(seed=41), encoded(seed=42)]
    assert not any(store.tolerant(i)[0] for i in range(3))


# policies
# ----------------------------------------------------------------------------------------------------

BAD = {
    "truncated": jpeg(0)[:-800],
    "corrupt": dict(damaged_jpegs())["hole"],
    "suspect": jpeg(0)[:-2] + b"\1\2\3\4" + jpeg(0)[-2:],
    "not_an_image": b"<html></html>",
    "empty": b"",
}


def with_bad(folder, kind="zip"):
    folder.images("pics", kind, {f"{name}.jpg": data for name, data in BAD.items()} | GOOD)
    names = [*GOOD, *(f"{name}.jpg" for name in BAD), "missing.jpg"]
    folder.annotations("notes", [conversation(name, id=name) for name in names])


@pytest.mark.parametrize("kind", ["zip", "tar", "folder"])
def test_the_default_policy_keeps_what_can_be_decoded(folder, kind):
    with_bad(folder, kind)
    report = folder.mix(part(policy=LOOSE))["parts"][0]
    assert report["dropped"] == {"corrupt": 1, "empty": 1, "missing": 1, "not_an_image": 1}
    assert report["kept_damaged"] == {"suspect": 1, "truncated": 1}
    assert report["examples"]["missing"][0]["id"] == "missing.jpg"
    assert "HTML" in report["examples"]["not_an_image"][0]["detail"]
    store = open_samples(folder.mixture)
    tolerant = {store.record(i)["id"] for i in range(len(store)) if store.tolerant(i)[0]}
    assert tolerant == {"truncated.jpg"}
    assert len(store) == 12


@pytest.mark.parametrize("status", [*BAD, "missing"])
@pytest.mark.parametrize("action", ["drop", "fail"])
def test_each_policy_does_what_it_says(folder, status, action):
    with_bad(folder)
    policy = LOOSE | {status: action}
    if action == "fail":
        with pytest.raises(UserError, match=f"{status}.jpg is {status}"):
            folder.mix(part(policy=policy))
        assert not (folder.mixture / "manifest.json").exists()
    else:
        assert folder.mix(part(policy=policy))["parts"][0]["dropped"][status] == 1


def test_corrupt_images_can_be_kept(folder):
    with_bad(folder)
    manifest = folder.mix(part(policy=LOOSE | {"corrupt": "keep"}))
    assert manifest["parts"][0]["kept_damaged"]["corrupt"] == 1
    assert open_samples(folder.mixture).tolerant(11) == [True]


def test_too_many_dropped_records_stop_with_reasons(folder):
    with_bad(folder)
    with pytest.raises(UserError, match=r"4 of 16 records \(25.00%\)") as error:
        folder.mix(part(policy={"max_dropped_share": 0.2}))
    assert "not_an_image: notes.json, record 14" in str(error.value)


def test_one_bad_image_of_several_drops_the_record(folder):
    with_bad(folder)
    folder.annotations("notes", [conversation(["0.jpg", "empty.jpg"]), conversation(["1.jpg", "2.jpg"])])
    folder.mix(part(policy=LOOSE))
    store = open_samples(folder.mixture)
    assert len(store) == 1
    assert store.image_bytes(0) == [GOOD["1.jpg"], GOOD["2.jpg"]]
    assert store.tolerant(0) == [False, False]


# records
# ----------------------------------------------------------------------------------------------------

MALFORMED = [
    ({"id": 1}, "conversations"),
    ({"conversations": []}, "conversations is empty"),
    ({"conversations": "hello"}, "Expected `array`"),
    ({"conversations": [{"from": "human"}]}, "value"),
    ({"conversations": [{"from": "human", "value": 3}]}, "$.conversations[0].value"),
    (conversation(3), "$.image"),
    (conversation([""]), "no path inside"),
    (conversation("../../etc/passwd"), "no path inside"),
    (conversation("\\etc\\passwd"), "no path inside"),
    ([], "Expected `object`"),
    (None, "Expected `object`"),
]


def test_malformed_records_are_named_by_file_and_number(folder):
    simple(folder)
    folder.annotations(
        "notes", [conversation("0.jpg"), *(record for record, _ in MALFORMED), conversation("1.jpg")]
    )
    with pytest.raises(UserError) as error:
        folder.mix(part())
    lines = [line for line in str(error.value).splitlines() if line.startswith("  notes.json")]
    for number, (line, (_, why)) in enumerate(zip(lines, MALFORMED, strict=True), start=2):
        assert line.startswith(f"  notes.json, record {number}: ")
        assert why in line
    report = folder.mix(part(policy=LOOSE | {"malformed": "drop"}))["parts"][0]
    assert report["dropped"] == {"malformed": len(MALFORMED)}
    assert report["used"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1, "conversations": [}]', "record 1 is not valid JSON"),
        ('[{"id": 1}, {"id": 2}, {"id": 3', "2 records before it are whole"),
        ('[{"id": 1}, {"id": NaN}]', "NaN"),
        ('[{"id": 1}', "the file is cut"),
        ('{"data": [1, 2]}\n{"x"', "record 2 is not valid JSON"),
        ('{\n  "data": []\n}', "is one JSON object, not a list"),
        ("hello", "must be a JSON array"),
        ("", "must be a JSON array"),
        ('[{"id": 1}] trailing', "behind the end"),
    ],
)
def test_broken_json_is_named_by_record(folder, text, message):
    simple(folder)
    folder.annotations("notes", None, text=text)
    with pytest.raises(UserError, match=r"notes\.json") as error:
        folder.mix(part())
    assert message in str(error.value)


def test_json_lines_several_files_and_their_order(folder):
    simple(folder)
    lines = "\n".join(json.dumps(conversation(f"{i}.jpg", id=i)) for i in range(3)) + "\n\n"
    (folder.path / "b.jsonl").write_text("\ufeff" + lines)
    (folder.path / "a.json").write_text(json.dumps([conversation("9.jpg", id=9)]))
    files = [str(folder.path / name) for name in ("b.jsonl", "a.json")]
    folder.source("notes", {"kind": "path", "annotations": files})
    folder.mix(part())
    store = open_samples(folder.mixture)
    assert [store.record(i)["id"] for i in range(4)] == [0, 1, 2, 9]
    folder.mix(part(files=["a.json"]))
    assert len(open_samples(folder.mixture)) == 1
    with pytest.raises(UserError, match=r"no annotation file 'c.json'"):
        folder.mix(part(files=["c.json"]))


def test_parts_follow_each_other_and_text_only_records_are_negative(folder):
    simple(folder)
    folder.annotations("chat", [conversation(None, "one two three", "four")])
    manifest = folder.mix(part(), {"annotations": "chat"})
    store = open_samples(folder.mixture)
    assert store.lengths.tolist() == [6] * 10 + [-4]
    assert store.source(10) == "chat"
    assert manifest["text_only"] == 1
    assert store.image_bytes(10) == []


def test_words_are_counted_as_llava_does(folder):
    folder.images("pics", "zip", GOOD)
    texts = ["a b", " a\tb\nc ", "\u00e9t\u00e9 \u3000 x\u00a0y", "", "x\x1cy", "\u6587\u5b57 z"]
    folder.annotations("notes", [conversation("1.jpg", text, "w") for text in texts])
    folder.mix(part())
    expected = [
        sum(len(turn["value"].split()) for turn in conversation("1.jpg", text, "w")["conversations"])
        for text in texts
    ]
    assert open_samples(folder.mixture).lengths.tolist() == expected


def test_counts_are_checked(folder):
    simple(folder)
    assert folder.mix(part(expected_records=10), expected_records=10)["records"] == 10
    with pytest.raises(UserError, match="expected_records is 11, but the annotations have 10"):
        folder.mix(part(expected_records=11))
    with pytest.raises(UserError, match="expected_records is 9, but 10 records come out"):
        folder.mix(part(), expected_records=9)


@pytest.mark.parametrize(("action", "records"), [("keep", 12), ("drop", 10)])
def test_duplicate_ids(folder, action, records):
    simple(folder)
    twice = [conversation(f"{i % 10}.jpg", id=i % 10, answer=str(i)) for i in range(12)]
    folder.annotations("notes", twice)
    manifest = folder.mix(part(policy=LOOSE | {"duplicate_ids": action}))
    assert manifest["records"] == records
    assert manifest["parts"][0]["duplicate_ids"] == 2
    assert open_samples(folder.mixture).record(0) == twice[0], "the first stays"


def test_duplicate_ids_can_be_errors_and_absent_ids_are_no_duplicates(folder):
    simple(folder)
    folder.annotations("notes", [conversation("1.jpg", id=None), conversation("2.jpg", id=None)])
    assert folder.mix(part(policy={"duplicate_ids": "fail"}))["records"] == 2
    folder.annotations("notes", [conversation("1.jpg", id="a"), conversation("2.jpg", id="a")])
    with pytest.raises(UserError, match=r"record 2: id 'a'"):
        folder.mix(part(policy={"duplicate_ids": "fail"}))


def test_placeholders_that_do_not_fit_are_counted(folder):
    simple(folder)
    without = conversation(None, "no placeholder") | {"image": "1.jpg"}
    alone = conversation(None, "what does <image> mean")
    folder.annotations("notes", [without, alone, conversation("2.jpg")])
    assert folder.mix(part())["parts"][0]["placeholder_mismatches"]["count"] == 2


def test_an_empty_mixture_is_an_error(folder):
    simple(folder)
    with pytest.raises(UserError, match="no record is left"):
        folder.mix(part(samples=0))


# choices
# ----------------------------------------------------------------------------------------------------


def ids(folder):
    store = open_samples(folder.mixture)
    return [store.record(i)["id"] for i in range(len(store))]


def test_samples_and_weights(folder):
    simple(folder)
    folder.mix(part(samples=4))
    four = ids(folder)
    assert len(set(four)) == 4
    assert four == sorted(four)
    folder.mix(part(samples=6))
    assert set(four) < set(ids(folder)), "more samples keep the earlier ones"
    folder.mix(part(samples=4), seed=1)
    assert ids(folder) != four
    folder.mix(part(weight=0.5))
    assert len(ids(folder)) == 5
    folder.mix(part(weight=2.3))
    assert sorted(np.bincount(ids(folder)).tolist()) == [2] * 7 + [3] * 3
    assert open_samples(folder.mixture).image_bytes(22) == [GOOD["9.jpg"]]


def test_samples_per_image_source(folder):
    folder.images("one", "zip", {f"{i}.jpg": GOOD[f"{i}.jpg"] for i in range(6)})
    folder.images("two", "zip", {f"{i}.jpg": GOOD[f"{i}.jpg"] for i in range(6)})
    names = [f"{source}/{i}.jpg" for source in "ab" for i in range(6)]
    folder.annotations("notes", [conversation(name) for name in names] + [conversation()])
    images = [{"prefix": "a", "source": "one", "samples": 2}, {"prefix": "b", "source": "two", "weight": 0.5}]
    manifest = folder.mix({"annotations": "notes", "images": images})
    assert {name: c["records"] for name, c in manifest["counts"].items()} == {"one": 2, "two": 3, "notes": 1}


# what can be wrong around it
# ----------------------------------------------------------------------------------------


def test_an_archive_that_changed_after_its_scan(folder):
    simple(folder)
    with (folder.path / "pics.zip").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(UserError, match="changed after its scan"):
        folder.mix(part())


def test_sources_that_do_not_fit(folder):
    simple(folder)
    with pytest.raises(UserError, match="manifest of nothing is missing"):
        folder.mix(part(annotations="nothing"))
    with pytest.raises(UserError, match="has no annotations"):
        folder.mix(part(annotations="pics"))
    with pytest.raises(UserError, match="has no images"):
        folder.mix(part(source="notes"))


def test_the_command_says_what_happened_without_a_traceback(folder, capsys):
    with_bad(folder)
    manifest = folder.mixture / "manifest.json"
    arguments = [
        "--name",
        "M",
        "--manifest",
        str(manifest),
        "--sources",
        *map(str, folder.sources),
        "--scans",
    ]
    arguments += map(str, folder.scans)
    merge.main([*arguments, "--spec", json.dumps({"parts": [part(policy=LOOSE)]})])
    shown = capsys.readouterr().err
    assert "16 records, 12 used, dropped: 1 corrupt, 1 empty, 1 missing, 1 not_an_image" in shown
    with pytest.raises(SystemExit):
        merge.main([*arguments, "--spec", json.dumps({"parts": [part(polcy={})]})])
    assert "polcy" in capsys.readouterr().err
    assert read_json(manifest)["records"] == 12


@pytest.mark.parametrize("window", [64, 300, 1000, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_records_are_split_right_whatever_the_window(tmp_path, window, indent):
    """Nested objects, brackets and escapes in strings, and a window that ends anywhere."""
    from llava_ext.data.json_records import iterate_records

    tricky = 'x}, {"id": "fake", "conversations": [] } ], [ \\" \\\\'
    records = [
        {"id": str(i), "a": {"id": [{"b": tricky}, {}]}, "conversations": [tricky * (i % 7)]}
        for i in range(40)
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records, indent=indent))
    found = list(iterate_records(path, window))
    assert [json.loads(bytes(raw.data)) for raw in found] == records
    data = path.read_bytes()
    assert all(data[raw.offset : raw.offset + len(raw.data)] == bytes(raw.data) for raw in found)
    assert [raw.number for raw in found] == list(range(1, 41))


def test_npy_files_are_plain(folder):
    simple(folder)
    folder.mix(part())
    for name in ("records.npy", "images.npy"):
        assert len(np.load(io.BytesIO((folder.mixture / name).read_bytes()), allow_pickle=False)) == 10
