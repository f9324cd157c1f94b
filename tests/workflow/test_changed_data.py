"""Pictures in a folder of the user's own: what changed is looked at again, and only that."""

import os
import shutil

import pytest

from tests.support.pictures import encoded
from tests.support.workspace import Workspace

pytestmark = pytest.mark.slow
AGAIN = [
    "acquire: data/sources/album/manifest.json",
    "mixture: data/mixtures/album/manifest.json",
    "scan: data/scans/album/manifest.json",
]
TARGET = "data/mixtures/album/manifest.json"


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    """A folder with three pictures and their captions, merged."""
    workspace = Workspace(tmp_path_factory.mktemp("changed") / "w", warm=True).draw()
    album = workspace.folder / "mine" / "album"
    album.mkdir()
    for number in range(3):
        (album / f"{number}.jpg").write_bytes(encoded(seed=number))
    turns = '[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a picture"}]'
    records = ", ".join(f'{{"id": {n}, "image": "{n}.jpg", "conversations": {turns}}}' for n in range(3))
    (workspace.folder / "mine" / "album.json").write_text(f"[{records}]")
    workspace.config["sources"]["album"] = {
        "kind": "path",
        "images": "mine/album",
        "annotations": "mine/album.json",
    }
    workspace.config["mixtures"]["album"] = {
        "parts": [{"annotations": "album", "images": [{"source": "album"}]}]
    }
    workspace.run(TARGET)
    return workspace


def replaced(album):
    (album / "1.jpg").write_bytes(encoded(seed=11))


def added(album):
    (album / "9.jpg").write_bytes(encoded(seed=9))


def removed(album):
    (album / "2.jpg").unlink()


def edited_annotations(album):
    path = album.with_name("album.json")
    path.write_text(path.read_text().replace("a picture", "a photo", 1))


@pytest.mark.parametrize("change", [replaced, added, removed, edited_annotations])
def test_a_change_is_noticed(scanned, tmp_path, change):
    workspace = scanned.copy_to(tmp_path / "w")
    assert workspace.planned(TARGET) == []
    change(workspace.folder / "mine" / "album")
    assert workspace.planned(TARGET) == AGAIN


def test_a_touched_picture_is_looked_at_and_gives_the_same_data(scanned, tmp_path):
    workspace = scanned.copy_to(tmp_path / "w")
    before = workspace.json(TARGET)["digest"]
    os.utime(workspace.folder / "mine" / "album" / "0.jpg")
    workspace.run(TARGET)
    assert workspace.json(TARGET)["digest"] == before
    assert workspace.planned(TARGET) == []


def test_a_source_that_disappeared_is_named(scanned, tmp_path):
    workspace = scanned.copy_to(tmp_path / "w")
    shutil.rmtree(workspace.folder / "mine" / "album")
    done = workspace.run("-n", TARGET, check=False)
    assert done.returncode != 0
    assert "sources.album.images" in done.stdout
