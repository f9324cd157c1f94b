"""What renames trainings, and what does not, of data from the network: the second table of docs/reruns.md."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from tests.support.servers import Server
from tests.support.workspace import SMALL
from workflow_scripts.acquire.settled import Settled
from workflow_scripts.config.load import load_config, load_files
from workflow_scripts.plan.describe import describe_plan
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plan.source_keys import SOURCES, memory_path
from workflow_scripts.sources import KINDS, SourceSpec

ROOT = Path(__file__).parents[2]
DATA = json.dumps([{"id": "1", "conversations": [{"from": "human", "value": "hello"}]}]).encode()
SHA = hashlib.sha256(DATA).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


pytestmark = pytest.mark.usefixtures("small_files")


@pytest.fixture
def server():
    with Server().running() as running:
        running.add("/a.json", DATA)
        yield running


def url_file(*urls, **more):
    return {"url": list(urls), "role": "annotations"} | more


def hub(file, revision=COMMIT):
    return {"kind": "hub", "repo": "owner/data", "revision": revision, "files": [file]}


def names(*files, source=None):
    """The names of all runs of a configuration whose stage 1 reads these files."""
    config = copy.deepcopy(SMALL)
    config["sources"]["captions"] = source or {"kind": "url", "files": list(files)}
    config["mixtures"]["pretrain"]["parts"][0]["images"] = []
    return sorted(run.name for run in Plan(load_config(config)).runs.values())


def plan_of(source):
    config = copy.deepcopy(SMALL)
    config["sources"]["captions"] = source
    config["mixtures"]["pretrain"]["parts"][0]["images"] = []
    return Plan(load_config(config))


def test_a_branch_is_named_in_the_plan_with_the_commit_that_it_was():
    file = {"path": "a.json", "role": "annotations"}
    said = "MOVES: sources.captions.revision: 'main' is no commit; taken as "
    assert said + "the commit that it is at the first fetch" in describe_plan(plan_of(hub(file, "main")))
    Settled("captions", SOURCES).write("owner/data", "main", COMMIT)
    assert f"{said}commit {COMMIT} here" in describe_plan(plan_of(hub(file, "main")))
    for fixed in (hub(file), hub(file, COMMIT[:7]), hub(file | PINNED, "main")):
        assert "MOVES" not in describe_plan(plan_of(fixed))


A, B = "https://a.example/a.json", "https://b.example/b.json"
PINNED = {"sha256": SHA}

SAME = {
    "another mirror of a pinned file": ([url_file(A, **PINNED)], [url_file(B, **PINNED)]),
    "one more mirror of a pinned file": ([url_file(A, **PINNED)], [url_file(A, B, **PINNED)]),
    "another order of mirrors": ([url_file(A, B, **PINNED)], [url_file(B, A, **PINNED)]),
    "another scheme": ([url_file(A, **PINNED)], [url_file(A.replace("https", "http"), **PINNED)]),
    "another name on the disk": ([url_file(A, **PINNED)], [url_file(A, name="c.json", **PINNED)]),
    "a signature by reference": ([url_file(A, **PINNED)], [url_file(A + "?sig=${SIG}", **PINNED)]),
    "a size": ([url_file(A)], [url_file(A, bytes=len(DATA))]),
}
OTHER = {
    "another URL of a file without a hash": ([url_file(A)], [url_file(B)]),
    "another hash": ([url_file(A, **PINNED)], [url_file(A, sha256="0" * 64)]),
    "another URL of a first-use hash": (
        [url_file(A, trust="first_use", **PINNED)],
        [url_file(B, trust="first_use", **PINNED)],
    ),
}


@pytest.mark.parametrize(("before", "after"), SAME.values(), ids=SAME)
def test_how_a_file_is_fetched_names_no_training(before, after):
    assert names(*before) == names(*after)


@pytest.mark.parametrize(("before", "after"), OTHER.values(), ids=OTHER)
def test_what_may_be_another_file_names_other_trainings(before, after):
    assert names(*before) != names(*after)


def test_one_pinned_file_beside_one_without_a_hash():
    other = url_file("https://a.example/x.json")
    assert names(url_file(A, **PINNED), other) == names(url_file(B, **PINNED), other)
    moved = url_file("https://b.example/x.json")
    assert names(url_file(A, **PINNED), other) != names(url_file(A, **PINNED), moved)


def test_a_hubs_file_is_its_commit_whatever_the_mirrors():
    plain = {"path": "a.json", "role": "annotations"}
    assert names(source=hub(plain)) == names(source=hub(plain | {"mirrors": [A, B]}))
    assert names(source=hub(plain)) != names(source=hub(plain, COMMIT[::-1]))


def test_a_pinned_file_of_a_hub_and_its_copy_elsewhere_are_the_same_file():
    file = {"path": "a.json", "role": "annotations"} | PINNED
    assert names(source=hub(file)) == names(source=hub(file, COMMIT[::-1])) == names(url_file(B, **PINNED))


def fetched(*files):
    """The names of the runs after these files were really fetched."""
    spec = TypeAdapter(SourceSpec).validate_python({"kind": "url", "files": list(files)})
    folder = Path("data/sources/captions")
    folder.mkdir(parents=True, exist_ok=True)
    KINDS[spec.kind].make(spec, folder)
    return names(*files)


def test_a_hash_that_is_added_later_renames_nothing(server):
    url = server.url + "/a.json"
    before = names(url_file(url))
    assert fetched(url_file(url)) == before, "fetching renames nothing"
    assert names(url_file(url, **PINNED)) == before
    assert names(url_file(B, **PINNED)) == before, "nor does another mirror after it"
    assert fetched(url_file(url, **PINNED)) == before, "nor being looked at again"
    assert names(url_file(url, sha256="0" * 64)) != before
    assert names(url_file(B)) != before, "without the hash the URL decides, as ever"


def test_deleting_a_download_forgets_no_name(server):
    url = server.url + "/a.json"
    before = fetched(url_file(url))
    for path in Path("data/sources/captions").iterdir():
        path.unlink()
    assert names(url_file(url, **PINNED)) == before
    memory_path("captions").write_text("damaged")
    assert names(url_file(url, **PINNED)) != before


def test_a_pinned_file_under_the_name_of_another_mirror_is_not_fetched_again(server):
    copy_url = server.add("/copy.json", DATA)
    fetched(url_file(server.url + "/a.json", **PINNED))
    fetched(url_file(copy_url, **PINNED))
    assert not server.gets("/copy.json")
    assert Path("data/sources/captions/copy.json").read_bytes() == DATA


SHIPPED = {
    "config.yaml": ("pretrain/vanilla-0208fe24dd", "finetune/normalize-multilayer-04e931b0b3"),
    "llava-v1.5-7b.yaml": ("pretrain/vanilla-a6b3bbb8f2", "finetune/compress-4-b8bcfd76a0"),
}


@pytest.mark.parametrize("file", SHIPPED)
def test_trainings_of_the_shipped_configurations_keep_their_names(file):
    """A change of these names would train everything again."""
    plan = Plan(load_files([ROOT / "config" / file]))
    assert {f"{stage}/{run.name}" for (stage, _), run in plan.runs.items()} >= set(SHIPPED[file])
