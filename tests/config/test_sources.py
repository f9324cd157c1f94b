"""What a source of the network may be called and where it may come from; no message repeats a secret."""

from __future__ import annotations

import copy
import os
import subprocess

import pytest

from llava_ext.files import write_text
from tests.support.workspace import SMALL
from workflow_scripts.config.load import load_config
from workflow_scripts.io import UserError
from workflow_scripts.secrets import hide, public, redact

GEHEIM = "AKgeheim0123456789abcdef"


pytestmark = pytest.mark.usefixtures("small_files")


def load(*files, kind="url"):
    config = copy.deepcopy(SMALL)
    source = {"kind": kind, "files": [{"role": "other"} | file for file in files]}
    if kind == "hub":
        source |= {"repo": "owner/data", "revision": "v1"}
    config["sources"]["more"] = source
    return load_config(config)


def refusal(*files, kind="url"):
    with pytest.raises(UserError) as error:
        load(*files, kind=kind)
    return str(error.value)


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        (f"https://user:{GEHEIM}@example.org/a.zip", "~/.netrc"),
        (f"https://example.org/a.zip?X-Amz-Signature={GEHEIM}", "export SOME_NAME"),
        (f"https://example.org/a.zip?x={GEHEIM}", "export SOME_NAME"),
        (f"https://example.org/a.zip?sig={GEHEIM[:5]}", "export SOME_NAME"),
        (f"https://[example.org/a.zip?sig={GEHEIM}", "can't be read"),
        (f"https://example.org:port/a.zip?sig={GEHEIM}", "can't be read"),
        (f"ftp://user:{GEHEIM}@example.org/a.zip", "~/.netrc"),
        (f"https://example.org/?sig={GEHEIM}", "name"),
    ],
)
def test_a_literal_secret_in_a_url_is_refused_and_not_repeated(url, advice):
    said = refusal({"url": url})
    assert advice in said
    assert GEHEIM[:5] not in said


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/a.zip?download=1",
        "https://example.org/a.zip?sig=${SIG}&se=2030-01-01",
        "https://example.org/${PLACE}/a.zip",
        "https://example.org/a.zip?file=images/train2017.zip",
    ],
)
def test_references_and_harmless_parameters_are_taken(url):
    assert load({"url": url}).config.sources["more"].files[0].url == (url,)


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ({"name": "manifest.json"}, "own files"),
        ({"name": ".a.zip.provenance.json"}, "own files"),
        ({"name": "x/a.zip.part"}, "own files"),
        ({"name": "a.zip.wrong-0123abcd"}, "own files"),
        ({"name": "a" * 201}, "more than 200 bytes"),
        ({"name": "ä" * 101}, "more than 200 bytes"),
        ({"name": "a\0b"}, "can't be printed"),
        ({"name": "a\nb"}, "can't be printed"),
        ({"url": "https://example.org/a%00b"}, "can't be printed"),
        ({"url": "https://example.org/" + "a" * 300}, "more than 200 bytes"),
        ({"url": "https://example.org/${PLACE}"}, "add `name:`"),
    ],
)
def test_names_that_can_not_be_a_files(file, word):
    assert word in refusal({"url": "https://example.org/b"} | file)


def test_a_hubs_manifest_would_take_the_place_of_ours():
    assert "own files" in refusal({"path": "manifest.json"}, kind="hub")
    load({"path": "data/manifest.json"}, kind="hub")


def test_a_file_can_not_be_a_folder_too():
    url = "https://example.org/b"
    assert "a file and a folder" in refusal({"url": url, "name": "a"}, {"url": url, "name": "a/b"})


def test_what_is_struck_out_of_messages():
    hide("top+geheim/1", "${SIG}")
    text = (
        "host='x': Max retries exceeded with url: /a/b?X-Amz-Signature=geheim (Caused by x) "
        "https://user:geheim@h.org/a?b=geheim#geheim, 'http://h/x?geheim' top%2Bgeheim%2F1 top+geheim/1 what?"
    )
    said = redact(text)
    assert "geheim" not in said
    assert "/a/b?..." in said and "https://h.org/a?..." in said and said.endswith("${SIG} ${SIG} what?")
    assert public("https://user:geheim@h.org:81/a?b=geheim") == "https://h.org:81/a"


def test_temporary_files_of_killed_writers_are_cleaned(tmp_path):

    dead = subprocess.Popen(["true"])
    dead.wait()
    old, young, alive = (
        tmp_path / f".a.json.{pid}.tmp" for pid in (dead.pid, dead.pid + 10**6, os.getppid())
    )
    for path in (old, young, alive):
        path.touch()
    for path in (old, alive):
        os.utime(path, (0, 0))
    write_text(tmp_path / "a.json", "{}")
    assert not old.exists()
    assert young.exists(), "perhaps another machine is writing it"
    assert alive.exists()
