"""The reader that training uses: mixtures and plain LLaVA JSON, in several processes, without trust."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import zipfile
from pathlib import Path

import pytest

from llava_ext.data.record_view import join_name, unsafe_path
from llava_ext.data.samples import SamplesError, open_samples
from tests.archives.test_archives import make_folder, make_zip
from tests.support.damage import jpeg
from tests.support.mixing import LOOSE, DataFolder, conversation
from tests.support.pictures import encoded

IMAGES = {f"{i}.jpg": encoded(seed=i) for i in range(30)}


@pytest.fixture
def mixture(tmp_path):
    """A zip, a deflated zip, a tar and a folder in one mixture."""
    folder = DataFolder(tmp_path)
    folder.images("zip", "zip", IMAGES)
    make_zip(tmp_path / "packed.zip", IMAGES.items(), zipfile.ZIP_DEFLATED)
    folder.source("packed", {"kind": "path", "images": str(tmp_path / "packed.zip")})
    folder.images("tar", "tar", IMAGES)
    folder.images("folder", "folder", {f"sub/{name}": data for name, data in IMAGES.items()})
    kinds = ["zip", "packed", "tar", "folder"]
    folder.annotations("notes", [conversation(f"{kind}/{i}.jpg", id=i) for i in range(30) for kind in kinds])
    images = [{"prefix": kind, "source": kind} for kind in kinds]
    folder.mix({"annotations": "notes", "images": images})
    return folder


def check_all(store):
    for index in range(len(store)):
        assert store.image_bytes(index) == [IMAGES[f"{index // 4}.jpg"]]
        assert store.record(index)["id"] == index // 4
    return os.getpid()


def test_every_kind_of_store_gives_the_same_bytes(mixture):
    store = open_samples(mixture.mixture)
    check_all(store)
    assert [store.source(i) for i in range(4)] == ["zip", "packed", "tar", "folder"] == store.sources
    assert store.lengths.dtype == "int32"


@pytest.mark.parametrize("name", ["", "samples.json", "manifest.json"])
def test_a_mixture_is_opened_by_any_of_its_names(mixture, name):
    assert len(open_samples(mixture.mixture / name)) == 120


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataset_workers_share_a_store(mixture, method):
    store = open_samples(mixture.mixture)
    store.image_bytes(0)  # files are open before the fork
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert os.getpid() not in pool.map_async(check_all, [store] * 4).get(timeout=120)
    check_all(store)


def test_a_pickled_store_is_small(mixture):
    assert len(pickle.dumps(open_samples(mixture.mixture))) < 500


def test_a_moved_working_folder_still_works(mixture, tmp_path, monkeypatch):
    """Stores below the working folder are named relative to the mixture."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    folder = DataFolder(work)
    folder.source("shapes", {"kind": "shapes", "split": "captions", "pictures": 5})
    folder.mix({"annotations": "shapes", "images": [{"source": "shapes"}]})
    work.rename(tmp_path / "moved")
    store = open_samples(tmp_path / "moved" / "data" / "mixtures" / "M")
    assert all(store.image_bytes(i)[0].startswith(b"\xff\xd8") for i in range(5))


def test_images_that_changed_since_the_scan_are_not_trained_on(mixture):
    store = open_samples(mixture.mixture)
    with (mixture.path / "zip.zip").open("r+b") as stream:
        stream.seek(200)
        stream.write(b"\0\0\0\0")
    (mixture.path / "folder" / "sub" / "0.jpg").write_bytes(encoded(seed=77))
    for index, name in ((0, "zip.zip"), (3, "folder")):
        with pytest.raises(SamplesError, match=f"{name} is not what the scan saw"):
            store.image_bytes(index)
    (mixture.path / "tar.tar").write_bytes(b"short")
    with pytest.raises(SamplesError, match="ends at byte"):
        store.image_bytes(2)
    (mixture.path / "packed.zip").unlink()
    with pytest.raises(SamplesError, match="No such file"):
        open_samples(mixture.mixture).image_bytes(1)


@pytest.mark.parametrize("name", ["manifest.json", "records.npy", "images.npy", "samples.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_incomplete_mixtures_are_refused(mixture, name, damage):
    path = mixture.mixture / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-5])
    if (name, damage) == ("records.npy", "missing"):
        return  # then it is a plain JSON, and says that it needs an image folder
    with pytest.raises(SamplesError):
        open_samples(mixture.mixture)


def test_an_image_only_mixture_without_text_and_the_other_way_round(tmp_path):
    folder = DataFolder(tmp_path)
    folder.annotations("notes", [conversation(), conversation()])
    folder.mix({"annotations": "notes"})
    store = open_samples(folder.mixture)
    assert len(store) == 2
    assert store.image_bytes(1) == []
    assert store.tolerant(1) == []


def test_an_empty_image_is_no_image(tmp_path):
    """Code that asks whether a record has the key gets the right answer."""
    folder = DataFolder(tmp_path)
    folder.annotations("notes", [conversation() | {"image": empty} for empty in (None, [])])
    folder.mix({"annotations": "notes"})
    store = open_samples(folder.mixture)
    assert ["image" in store.record(i) for i in range(2)] == [False, False]
    assert store.lengths.tolist() == [-5, -5]


# plain LLaVA JSON
# ---------------------------------------------------------------------------------------------------


def plain(tmp_path, records, **images):
    make_folder(tmp_path / "pics", IMAGES.items())
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json", tmp_path / "pics"


def test_plain_json_and_a_folder(tmp_path):
    records = [conversation(f"{i}.jpg", id=i) for i in range(5)] + [
        conversation(["1.jpg", "2.jpg"]),
        conversation(),
    ]
    path, folder = plain(tmp_path, records)
    store = open_samples(path, folder)
    assert [store.record(i) for i in range(7)] == records
    assert store.image_bytes(5) == [IMAGES["1.jpg"], IMAGES["2.jpg"]]
    assert store.tolerant(5) == [False, False]
    assert open_samples(path, folder, tolerant=True).tolerant(0) == [True]
    assert store.lengths.tolist() == [6] * 5 + [7, -5], "each picture's marker is a word"
    assert store.source(0) == "data"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(store.image_bytes, (0,)) == [IMAGES["0.jpg"]]


def test_plain_and_mixed_agree(mixture, tmp_path):
    """The mixture's own JSON with extracted images is the same data set."""
    for kind in ("zip", "packed", "tar"):
        make_folder(tmp_path / "all" / kind, IMAGES.items())
    make_folder(tmp_path / "all" / "folder", IMAGES.items())
    mixed = open_samples(mixture.mixture)
    copy = tmp_path / "copy.json"
    copy.write_bytes((mixture.mixture / "samples.json").read_bytes())
    store = open_samples(copy, tmp_path / "all")
    assert store.lengths.tolist() == mixed.lengths.tolist()
    assert [store.record(i) for i in range(120)] == [mixed.record(i) for i in range(120)]
    assert [store.image_bytes(i) for i in range(120)] == [mixed.image_bytes(i) for i in range(120)]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([conversation("../x.jpg")], "leads out of the image folder"),
        ([conversation("/etc/x.jpg")], "absolute_path: an absolute path of an image: /etc/x.jpg"),
        ([conversation(), {"id": 1}], "record 2 is malformed"),
        ([{"conversations": [{"from": "human", "value": 3}]}], r"\$.conversations\[0\].value"),
    ],
)
def test_plain_json_is_checked_when_it_is_opened(tmp_path, records, message):
    path, folder = plain(tmp_path, records)
    with pytest.raises(SamplesError, match=message):
        open_samples(path, folder)


CHAT = {
    "id": 7,
    "messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "0.jpg"}}, "what is it"]},
        {"role": "assistant", "content": "a thing"},
    ],
}


def test_plain_json_of_another_form_is_read_as_the_merge_would_write_it(tmp_path):
    path, folder = plain(tmp_path, [conversation("0.jpg", id=1), CHAT, conversation(id=2) | {"image": ""}])
    store = open_samples(path, folder)
    assert store.record(1) == conversation("0.jpg", id=7)
    assert dict(store.mended) == {"other_keys": 1, "content_list": 1, "role_names": 1, "empty_image": 1}
    assert store.lengths.tolist() == [6, 6, -5]
    again = copy.deepcopy(store)
    assert again.record(1) == store.record(1) and "image" not in again.record(2)
    mended, _ = plain(tmp_path / "mended", [store.record(i) for i in range(3)])
    assert open_samples(mended, folder).mended == {}


def test_what_llava_trains_on_is_trained_on_as_it_is(tmp_path):
    odd = [conversation("0.jpg", id=1), conversation(id=2, video="a.mp4")]
    odd[0]["conversations"].insert(0, {"from": "system", "value": "short"})
    path, folder = plain(tmp_path, odd)
    store = open_samples(path, folder)
    assert [store.record(i) for i in range(2)] == odd and store.mended == {}


def test_every_record_that_can_not_be_trained_on_is_counted_before_the_training(tmp_path):
    tool = {"id": "t", "conversations": [{"from": "human", "value": "a"}, {"from": "tool", "value": "b"}]}
    path, folder = plain(tmp_path, [conversation(), tool, conversation("../x", id="up")] + 8 * [tool])
    with pytest.raises(SamplesError) as error:
        open_samples(path, folder)
    message = str(error.value)
    assert "9 records can't be trained on (9 unknown_role)" in message
    assert "record 2 (id 't'): unknown_role: a role that is none of human, gpt and system" in message
    assert message.count("record ") == 5


def test_plain_json_without_what_it_needs(tmp_path):
    path, folder = plain(tmp_path, [conversation("0.jpg"), conversation("none.jpg")])
    with pytest.raises(SamplesError, match="no image folder was given"):
        open_samples(path)
    with pytest.raises(SamplesError, match=r"none.jpg"):
        open_samples(path, folder).image_bytes(1)
    with pytest.raises(SamplesError, match="there is no such file"):
        open_samples(tmp_path / "nothing.json")
    path.write_text("[{]")
    with pytest.raises(SamplesError, match="record 1 is not valid JSON"):
        open_samples(path, folder)


@pytest.mark.parametrize("name", ["", "/a", "\\a", "a/../b", "..", "a\\..\\b", "a\0b"])
def test_paths_that_leave_the_folder(name):
    assert unsafe_path(name)


@pytest.mark.parametrize("name", ["a", "a/b", "a..b", "...", "a b", ".hidden", "\u00e9/x.jpg"])
def test_paths_that_stay(name):
    assert not unsafe_path(name)


@pytest.mark.parametrize(
    ("name", "prefix", "root", "joined"),
    [
        ("coco/train2017/1.jpg", "coco/train2017", "train2017", "train2017/1.jpg"),
        ("1.jpg", "", "", "1.jpg"),
        ("1.jpg", "", "images", "images/1.jpg"),
        ("a/b/1.jpg", "a", "", "b/1.jpg"),
    ],
)
def test_joining(name, prefix, root, joined):
    assert join_name(name, prefix, root) == joined


def memory_of_worker(pipe, path):
    """Private memory that reading 20,000 samples adds to a worker."""

    def private():
        with Path("/proc/self/smaps_rollup").open() as stream:
            return sum(int(line.split()[1]) for line in stream if line.startswith("Private_Dirty"))

    store = open_samples(path)
    before = private()
    for index in range(20_000):
        store.record_bytes(index)
    for index in range(0, 20_000, 100):
        store.image_bytes(index)
    pipe.send(private() - before)


def test_workers_stay_flat_in_memory(tmp_path):
    """20,000 records of 1 kB: a list of dicts would be tens of megabytes."""
    folder = DataFolder(tmp_path)
    folder.images("pics", "zip", {"0.jpg": jpeg(0)})
    folder.annotations("notes", [conversation("0.jpg", "word " * 200, id=i) for i in range(20_000)])
    folder.mix({"annotations": "notes", "images": [{"source": "pics"}], "policy": LOOSE})
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=memory_of_worker, args=(theirs, folder.mixture))
    worker.start()
    grown = ours.recv()
    worker.join()
    assert grown < 3000, f"{grown} kB"
