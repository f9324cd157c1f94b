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
from tests.support.mixing import LOOSE, Kitchen, conversation
from tests.support.pictures import encoded
from workflow_scripts.io import UserError, read_json
from workflow_scripts.merge import step as merge

ROOT = Path(__file__).parents[2]
GOOD = {f"{i}.jpg": encoded(seed=i) for i in range(10)}


@pytest.fixture
def kitchen(tmp_path):
    return Kitchen(tmp_path)


def part(annotations="notes", source="pics", prefix="", policy=None, **more):
    return {
        "annotations": annotations,
        "images": [{"prefix": prefix, "source": source}],
        "policy": policy or {},
        **more,
    }


def simple(kitchen, kind="zip", count=10, **options):
    kitchen.images("pics", kind, GOOD)
    kitchen.annotations("notes", [conversation(f"{i}.jpg", id=i, **options) for i in range(count)])


@pytest.mark.parametrize("kind", ["zip", "tar", "folder"])
def test_a_mixture_is_a_llava_json_whose_images_are_found(kitchen, kind):
    simple(kitchen, kind)
    manifest = kitchen.mix(part())
    records = json.loads((kitchen.mixture / "samples.json").read_text())
    assert records == [conversation(f"{i}.jpg", id=i) for i in range(10)]
    assert (manifest["records"], manifest["images"], manifest["text_only"]) == (10, 10, 0)
    store = open_samples(kitchen.mixture)
    assert [store.image_bytes(i) for i in range(10)] == [[GOOD[f"{i}.jpg"]] for i in range(10)]


def test_one_record_a_line_whatever_the_annotations_look_like(kitchen):
    simple(kitchen)
    pretty = json.dumps([conversation(f"{i}.jpg", "a\nb \u2028 \u00e9", id=i) for i in range(10)], indent=4)
    kitchen.annotations("notes", None, text=pretty)
    kitchen.mix(part())
    lines = (kitchen.mixture / "samples.json").read_bytes().split(b"\n")
    assert lines[0] == b"["
    assert lines[-2:] == [b"]", b""]
    assert [json.loads(line.rstrip(b","))["id"] for line in lines[1:-2]] == list(range(10))
    store = open_samples(kitchen.mixture)
    assert store.record(3) == conversation("3.jpg", "a\nb \u2028 \u00e9", id=3)


def test_equal_inputs_give_equal_bytes(kitchen, tmp_path):
    simple(kitchen)
    kitchen.mix(part(samples=7), seed=3)
    first = {path.name: path.read_bytes() for path in kitchen.mixture.iterdir()}
    command = [sys.executable, "-m", "workflow_scripts.merge", "--name", "M", "--manifest"]
    command += [
        str(kitchen.mixture / "manifest.json"),
        "--spec",
        json.dumps({"parts": [part(samples=7)], "seed": 3}),
    ]
    command += ["--sources", *map(str, kitchen.sources), "--scans", *map(str, kitchen.scans)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    assert {path.name: path.read_bytes() for path in kitchen.mixture.iterdir()} == first


def test_the_digest_is_about_content_not_about_storage(tmp_path):
    digests = set()
    for kind in ("zip", "tar", "folder"):
        kitchen = Kitchen(tmp_path / kind)
        kitchen.folder.mkdir()
        simple(kitchen, kind)
        digests.add(kitchen.mix(part())["digest"])
    assert len(digests) == 1
    kitchen.images("pics", "zip", GOOD | {"3.jpg": encoded(seed=33)})
    assert kitchen.mix(part())["digest"] not in digests


# joins --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["", "images", "deep/er/images"])
@pytest.mark.parametrize("prefix", ["", "coco/train2017"])
def test_the_root_folder_is_found_by_comparing_names(kitchen, root, prefix):
    kitchen.images("pics", "zip", {f"{root}/{name}".lstrip("/"): data for name, data in GOOD.items()})
    kitchen.annotations("notes", [conversation(f"{prefix}/{name}".lstrip("/")) for name in GOOD])
    manifest = kitchen.mix(part(prefix=prefix))
    assert manifest["parts"][0]["roots"] == [{"prefix": prefix, "source": "pics", "root": root}]
    assert open_samples(kitchen.mixture).image_bytes(4) == [GOOD["4.jpg"]]


def test_the_root_of_most_images_wins(kitchen):
    members = {f"a/{n}": d for n, d in GOOD.items()} | {f"b/{n}": encoded(seed=50) for n in list(GOOD)[:4]}
    kitchen.images("pics", "zip", members)
    kitchen.annotations("notes", [conversation(name) for name in GOOD])
    kitchen.mix(part())
    assert open_samples(kitchen.mixture).image_bytes(0) == [GOOD["0.jpg"]]


def test_prefixes_are_whole_folders_and_the_longest_wins(kitchen):
    kitchen.images("one", "zip", {"VG_100K/1.jpg": GOOD["1.jpg"]})
    kitchen.images("two", "tar", {"VG_100K_2/2.jpg": GOOD["2.jpg"]})
    kitchen.images("rest", "folder", {"vg/3.jpg": GOOD["3.jpg"]})
    names = ["vg/VG_100K/1.jpg", "vg/VG_100K_2/2.jpg", "vg/3.jpg"]
    kitchen.annotations("notes", [conversation(name) for name in names])
    images = [
        {"prefix": "", "source": "rest"},
        {"prefix": "vg/VG_100K", "source": "one"},
        {"prefix": "vg/VG_100K_2/", "source": "two"},
    ]
    manifest = kitchen.mix({"annotations": "notes", "images": images})
    store = open_samples(kitchen.mixture)
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
def test_a_mapping_that_finds_nothing_is_an_error_with_a_suggestion(
    kitchen, needed, member, mapping, message
):
    kitchen.images("pics", "zip", {member: encoded()})
    kitchen.annotations("notes", [conversation(needed)])
    with pytest.raises(UserError, match="none of the 1 images") as error:
        kitchen.mix({"annotations": "notes", "images": [{"source": "pics", **mapping}], "policy": LOOSE})
    assert message in str(error.value)


def test_images_that_no_prefix_covers(kitchen):
    simple(kitchen)
    kitchen.annotations("notes", [conversation("0.jpg"), conversation("gqa/images/7.jpg")])
    with pytest.raises(UserError, match=r"add a mapping to `images` for: .*'gqa/images'"):
        kitchen.mix(part(prefix="0.jpg"))


def test_names_in_another_unicode_form_are_the_same_names(kitchen):
    """Archives from a Mac write an accent as a character of its own."""
    kitchen.images("pics", "zip", {"e\u0301.jpg": GOOD["1.jpg"], "a.jpg": GOOD["2.jpg"]})
    kitchen.annotations("notes", [conversation("\u00e9.jpg"), conversation("a.jpg")])
    kitchen.mix(part())
    assert open_samples(kitchen.mixture).image_bytes(0) == [GOOD["1.jpg"]]


def test_any_suffix(kitchen):
    kitchen.images("pics", "zip", {"1.gif": encoded("GIF"), "2.jpg": GOOD["2.jpg"]})
    kitchen.annotations("notes", [conversation("1.jpg"), conversation("2.jpg")])
    with pytest.raises(UserError, match="1 missing"):
        kitchen.mix(part())
    mapping = {"source": "pics", "any_suffix": True}
    assert kitchen.mix({"annotations": "notes", "images": [mapping]})["records"] == 2


def test_a_fallback_source_gives_what_the_first_lacks_or_has_damaged(kitchen):
    kitchen.images("pics", "zip", {"0.jpg": GOOD["0.jpg"], "1.jpg": jpeg(1)[:-500]})
    kitchen.images("again", "folder", {f"copy/{i}.jpg": encoded(seed=40 + i) for i in range(3)})
    kitchen.annotations("notes", [conversation(f"{i}.jpg") for i in range(3)])
    kitchen.mix({"annotations": "notes", "images": [{"source": "pics"}, {"source": "again"}]})
    store = open_samples(kitchen.mixture)
    assert [store.image_bytes(i)[0] for i in range(3)] == [GOOD["0.jpg"], encoded(seed=41), encoded(seed=42)]
    assert not any(store.tolerant(i)[0] for i in range(3))


# policies -----------------------------------------------------------------------------------------------------------

BAD = {
    "truncated": jpeg(0)[:-800],
    "corrupt": dict(damaged_jpegs())["hole"],
    "suspect": jpeg(0)[:-2] + b"\1\2\3\4" + jpeg(0)[-2:],
    "not_an_image": b"<html></html>",
    "empty": b"",
}


def with_bad(kitchen, kind="zip"):
    kitchen.images("pics", kind, {f"{name}.jpg": data for name, data in BAD.items()} | GOOD)
    names = [*GOOD, *(f"{name}.jpg" for name in BAD), "missing.jpg"]
    kitchen.annotations("notes", [conversation(name, id=name) for name in names])


@pytest.mark.parametrize("kind", ["zip", "tar", "folder"])
def test_the_default_policy_keeps_what_can_be_decoded(kitchen, kind):
    with_bad(kitchen, kind)
    report = kitchen.mix(part(policy=LOOSE))["parts"][0]
    assert report["dropped"] == {"corrupt": 1, "empty": 1, "missing": 1, "not_an_image": 1}
    assert report["kept_damaged"] == {"suspect": 1, "truncated": 1}
    assert report["examples"]["missing"][0]["id"] == "missing.jpg"
    assert "HTML" in report["examples"]["not_an_image"][0]["detail"]
    store = open_samples(kitchen.mixture)
    tolerant = {store.record(i)["id"] for i in range(len(store)) if store.tolerant(i)[0]}
    assert tolerant == {"truncated.jpg"}
    assert len(store) == 12


@pytest.mark.parametrize("status", [*BAD, "missing"])
@pytest.mark.parametrize("action", ["drop", "fail"])
def test_each_policy_does_what_it_says(kitchen, status, action):
    with_bad(kitchen)
    policy = LOOSE | {status: action}
    if action == "fail":
        with pytest.raises(UserError, match=f"{status}.jpg is {status}"):
            kitchen.mix(part(policy=policy))
        assert not (kitchen.mixture / "manifest.json").exists()
    else:
        assert kitchen.mix(part(policy=policy))["parts"][0]["dropped"][status] == 1


def test_corrupt_images_can_be_kept(kitchen):
    with_bad(kitchen)
    manifest = kitchen.mix(part(policy=LOOSE | {"corrupt": "keep"}))
    assert manifest["parts"][0]["kept_damaged"]["corrupt"] == 1
    assert open_samples(kitchen.mixture).tolerant(11) == [True]


def test_too_many_dropped_records_stop_with_reasons(kitchen):
    with_bad(kitchen)
    with pytest.raises(UserError, match=r"4 of 16 records \(25.00%\)") as error:
        kitchen.mix(part(policy={"max_dropped_share": 0.2}))
    assert "not_an_image: notes.json, record 14" in str(error.value)


def test_one_bad_image_of_several_drops_the_record(kitchen):
    with_bad(kitchen)
    kitchen.annotations("notes", [conversation(["0.jpg", "empty.jpg"]), conversation(["1.jpg", "2.jpg"])])
    kitchen.mix(part(policy=LOOSE))
    store = open_samples(kitchen.mixture)
    assert len(store) == 1
    assert store.image_bytes(0) == [GOOD["1.jpg"], GOOD["2.jpg"]]
    assert store.tolerant(0) == [False, False]


# records ------------------------------------------------------------------------------------------------------------

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


def test_malformed_records_are_named_by_file_and_number(kitchen):
    simple(kitchen)
    kitchen.annotations(
        "notes", [conversation("0.jpg"), *(record for record, _ in MALFORMED), conversation("1.jpg")]
    )
    with pytest.raises(UserError) as error:
        kitchen.mix(part())
    lines = [line for line in str(error.value).splitlines() if line.startswith("  notes.json")]
    for number, (line, (_, why)) in enumerate(zip(lines, MALFORMED, strict=True), start=2):
        assert line.startswith(f"  notes.json, record {number}: ")
        assert why in line
    report = kitchen.mix(part(policy=LOOSE | {"malformed": "drop"}))["parts"][0]
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
def test_broken_json_is_named_by_record(kitchen, text, message):
    simple(kitchen)
    kitchen.annotations("notes", None, text=text)
    with pytest.raises(UserError, match=r"notes\.json") as error:
        kitchen.mix(part())
    assert message in str(error.value)


def test_json_lines_several_files_and_their_order(kitchen):
    simple(kitchen)
    lines = "\n".join(json.dumps(conversation(f"{i}.jpg", id=i)) for i in range(3)) + "\n\n"
    (kitchen.folder / "b.jsonl").write_text("\ufeff" + lines)
    (kitchen.folder / "a.json").write_text(json.dumps([conversation("9.jpg", id=9)]))
    files = [str(kitchen.folder / name) for name in ("b.jsonl", "a.json")]
    kitchen.source("notes", {"kind": "path", "annotations": files})
    kitchen.mix(part())
    store = open_samples(kitchen.mixture)
    assert [store.record(i)["id"] for i in range(4)] == [0, 1, 2, 9]
    kitchen.mix(part(files=["a.json"]))
    assert len(open_samples(kitchen.mixture)) == 1
    with pytest.raises(UserError, match=r"no annotation file 'c.json'"):
        kitchen.mix(part(files=["c.json"]))


def test_parts_follow_each_other_and_text_only_records_are_negative(kitchen):
    simple(kitchen)
    kitchen.annotations("chat", [conversation(None, "one two three", "four")])
    manifest = kitchen.mix(part(), {"annotations": "chat"})
    store = open_samples(kitchen.mixture)
    assert store.lengths.tolist() == [6] * 10 + [-4]
    assert store.source(10) == "chat"
    assert manifest["text_only"] == 1
    assert store.image_bytes(10) == []


def test_words_are_counted_as_llava_does(kitchen):
    kitchen.images("pics", "zip", GOOD)
    texts = ["a b", " a\tb\nc ", "\u00e9t\u00e9 \u3000 x\u00a0y", "", "x\x1cy", "\u6587\u5b57 z"]
    kitchen.annotations("notes", [conversation("1.jpg", text, "w") for text in texts])
    kitchen.mix(part())
    expected = [
        sum(len(turn["value"].split()) for turn in conversation("1.jpg", text, "w")["conversations"])
        for text in texts
    ]
    assert open_samples(kitchen.mixture).lengths.tolist() == expected


def test_counts_are_checked(kitchen):
    simple(kitchen)
    assert kitchen.mix(part(expected_records=10), expected_records=10)["records"] == 10
    with pytest.raises(UserError, match="expected_records is 11, but the annotations have 10"):
        kitchen.mix(part(expected_records=11))
    with pytest.raises(UserError, match="expected_records is 9, but 10 records come out"):
        kitchen.mix(part(), expected_records=9)


@pytest.mark.parametrize(("action", "records"), [("keep", 12), ("drop", 10)])
def test_duplicate_ids(kitchen, action, records):
    simple(kitchen)
    twice = [conversation(f"{i % 10}.jpg", id=i % 10, answer=str(i)) for i in range(12)]
    kitchen.annotations("notes", twice)
    manifest = kitchen.mix(part(policy=LOOSE | {"duplicate_ids": action}))
    assert manifest["records"] == records
    assert manifest["parts"][0]["duplicate_ids"] == 2
    assert open_samples(kitchen.mixture).record(0) == twice[0], "the first stays"


def test_duplicate_ids_can_be_errors_and_absent_ids_are_no_duplicates(kitchen):
    simple(kitchen)
    kitchen.annotations("notes", [conversation("1.jpg", id=None), conversation("2.jpg", id=None)])
    assert kitchen.mix(part(policy={"duplicate_ids": "fail"}))["records"] == 2
    kitchen.annotations("notes", [conversation("1.jpg", id="a"), conversation("2.jpg", id="a")])
    with pytest.raises(UserError, match=r"record 2: id 'a'"):
        kitchen.mix(part(policy={"duplicate_ids": "fail"}))


def test_placeholders_that_do_not_fit_are_counted(kitchen):
    simple(kitchen)
    without = conversation(None, "no placeholder") | {"image": "1.jpg"}
    alone = conversation(None, "what does <image> mean")
    kitchen.annotations("notes", [without, alone, conversation("2.jpg")])
    assert kitchen.mix(part())["parts"][0]["placeholder_mismatches"]["count"] == 2


def test_an_empty_mixture_is_an_error(kitchen):
    simple(kitchen)
    with pytest.raises(UserError, match="no record is left"):
        kitchen.mix(part(samples=0))


# choices ------------------------------------------------------------------------------------------------------------


def ids(kitchen):
    store = open_samples(kitchen.mixture)
    return [store.record(i)["id"] for i in range(len(store))]


def test_samples_and_weights(kitchen):
    simple(kitchen)
    kitchen.mix(part(samples=4))
    four = ids(kitchen)
    assert len(set(four)) == 4
    assert four == sorted(four)
    kitchen.mix(part(samples=6))
    assert set(four) < set(ids(kitchen)), "more samples keep the earlier ones"
    kitchen.mix(part(samples=4), seed=1)
    assert ids(kitchen) != four
    kitchen.mix(part(weight=0.5))
    assert len(ids(kitchen)) == 5
    kitchen.mix(part(weight=2.3))
    assert sorted(np.bincount(ids(kitchen)).tolist()) == [2] * 7 + [3] * 3
    assert open_samples(kitchen.mixture).image_bytes(22) == [GOOD["9.jpg"]]


def test_samples_per_image_source(kitchen):
    kitchen.images("one", "zip", {f"{i}.jpg": GOOD[f"{i}.jpg"] for i in range(6)})
    kitchen.images("two", "zip", {f"{i}.jpg": GOOD[f"{i}.jpg"] for i in range(6)})
    names = [f"{source}/{i}.jpg" for source in "ab" for i in range(6)]
    kitchen.annotations("notes", [conversation(name) for name in names] + [conversation()])
    images = [{"prefix": "a", "source": "one", "samples": 2}, {"prefix": "b", "source": "two", "weight": 0.5}]
    manifest = kitchen.mix({"annotations": "notes", "images": images})
    assert {name: c["records"] for name, c in manifest["counts"].items()} == {"one": 2, "two": 3, "notes": 1}


# what can be wrong around it ----------------------------------------------------------------------------------------


def test_an_archive_that_changed_after_its_scan(kitchen):
    simple(kitchen)
    with (kitchen.folder / "pics.zip").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(UserError, match="changed after its scan"):
        kitchen.mix(part())


def test_sources_that_do_not_fit(kitchen):
    simple(kitchen)
    with pytest.raises(UserError, match="manifest of nothing is missing"):
        kitchen.mix(part(annotations="nothing"))
    with pytest.raises(UserError, match="has no annotations"):
        kitchen.mix(part(annotations="pics"))
    with pytest.raises(UserError, match="has no images"):
        kitchen.mix(part(source="notes"))


def test_the_command_says_what_happened_without_a_traceback(kitchen, capsys):
    with_bad(kitchen)
    manifest = kitchen.mixture / "manifest.json"
    arguments = [
        "--name",
        "M",
        "--manifest",
        str(manifest),
        "--sources",
        *map(str, kitchen.sources),
        "--scans",
    ]
    arguments += map(str, kitchen.scans)
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


def test_npy_files_are_plain(kitchen):
    simple(kitchen)
    kitchen.mix(part())
    for name in ("records.npy", "images.npy"):
        assert len(np.load(io.BytesIO((kitchen.mixture / name).read_bytes()), allow_pickle=False)) == 10
