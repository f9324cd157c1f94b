"""Sources as the workflow makes them: the real command, a real server, the real hub client."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.acquiring import Acquiring
from tests.support.pictures import encoded, noise
from tests.support.servers import Fault, HubServer

ROOT = Path(__file__).parents[2]
JSON = json.dumps(
    [{"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>"}]}]
).encode()
README = b"small files are no LFS files\n"


def archive(*names):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name in names:
            file.writestr(name, encoded())
    return stream.getvalue()


ZIP = archive("a.jpg", "b.jpg") + b""


def sha(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def work(tmp_path, hub):
    return Acquiring(tmp_path, hub.url)


def hub_spec(hub, **more):
    files = [{"path": "images.zip", "role": "images"}, {"path": "anno.json", "role": "annotations"}]
    return {"kind": "hub", "repo": hub.repo, "revision": hub.commit, "files": files} | more


def fill(hub):
    hub.put("images.zip", ZIP)
    hub.put("anno.json", JSON)
    hub.put("README.md", README, lfs=False)


def test_hub_files_are_fetched_at_the_pinned_revision_and_verified(work, hub):
    fill(hub)
    spec = hub_spec(hub)
    spec["files"].append({"path": "README.md", "role": "other"})
    done = work.acquire(spec)
    assert done.returncode == 0, done.stderr
    manifest = work.manifest()
    assert manifest["images"] == {"type": "zip", "path": "images.zip"}
    assert manifest["annotations"] == [{"path": "anno.json", "role": "annotations"}]
    by_path = {file["path"]: file for file in manifest["files"]}
    assert by_path["images.zip"]["sha256"] == sha(ZIP)
    assert by_path["images.zip"]["revision"] == hub.commit
    assert by_path["README.md"]["verified"]
    assert (work.data / "images.zip").read_bytes() == ZIP


def test_a_shortened_commit_is_looked_up(work, hub):
    fill(hub)
    assert work.acquire(hub_spec(hub, revision=hub.commit[:7])).returncode == 0
    assert {f["revision"] for f in work.manifest()["files"]} == {hub.commit}


def questions(number):
    return json.dumps([{"id": str(number), "conversations": [{"from": "human", "value": "?"}]}]).encode()


def test_a_pattern_is_all_files_of_the_commit_that_are_called_so(work, hub):
    for number in range(3):
        hub.put(f"data/test-{number}-of-3-{number}{number}ab.json", questions(number))
    hub.put("data/train-0.json", questions(3))
    hub.put("data/more/test-0.json", questions(4))
    files = [{"path": "data/test-*.json", "role": "annotations"}]
    spec = hub_spec(hub, files=files)
    assert work.acquire(spec).returncode == 0
    names = [f"data/test-{number}-of-3-{number}{number}ab.json" for number in range(3)]
    assert [file["path"] for file in work.manifest()["annotations"]] == names
    first = (work.data / "manifest.json").read_bytes()

    (work.data / "manifest.json").unlink()
    asked = len(hub.requests)
    assert work.acquire(spec).returncode == 0
    assert work.acquire(spec, HF_HUB_OFFLINE="1").returncode == 0
    assert (work.data / "manifest.json").read_bytes() == first and len(hub.requests) == asked

    done = work.acquire(hub_spec(hub, files=[{"path": "data/tests-*.json", "role": "annotations"}]))
    assert done.returncode == 1
    assert "has no file 'data/tests-*.json'; it has data/" in done.stderr


def branch_spec(hub, *files):
    return hub_spec(hub, revision="main", files=[{"path": path, "role": "annotations"} for path in files])


def test_a_branch_stays_the_commit_that_it_was_at_the_first_fetch(work, hub):
    hub.put("a-1.json", questions(1))
    spec, first = branch_spec(hub, "a-*.json"), hub.commit
    done = work.acquire(spec)
    assert done.returncode == 0
    assert f"revision main) is commit {first} now and stays it here" in done.stdout + done.stderr
    assert [file["revision"] for file in work.manifest()["files"]] == [first]
    before = work.manifest()

    hub.move({"a-1.json": questions(3), "a-2.json": questions(2)})
    shutil.rmtree(work.data)  # to save space, say: what is fetched again has the same name in all runs
    assert work.acquire(spec).returncode == 0
    again = work.manifest()
    assert again["digest"] == before["digest"]
    assert [file["path"] for file in again["files"]] == ["a-1.json"]

    assert work.acquire(branch_spec(hub, "a-*.json") | {"revision": hub.commit}).returncode == 0
    assert [file["path"] for file in work.manifest()["files"]] == ["a-1.json", "a-2.json"]


def test_files_of_a_broken_download_and_later_ones_are_of_one_commit(work, hub):
    hub.put("a-1.json", questions(1))
    hub.put("a-2.json", questions(2))
    hub.files["a-2.json"].faults = [Fault("flip")] * 4
    assert work.acquire(branch_spec(hub, "a-1.json", "a-2.json")).returncode == 1
    first = hub.commit
    hub.files["a-2.json"].faults = []
    hub.move({"a-1.json": questions(3), "a-2.json": questions(4)})
    assert work.acquire(branch_spec(hub, "a-1.json", "a-2.json")).returncode == 0
    assert {file["revision"] for file in work.manifest()["files"]} == {first}
    assert (work.data / "a-2.json").read_bytes() == questions(2)


def test_a_branch_of_the_clients_cache_stays_what_it_was_too(work, hub):
    hub.put("a-1.json", questions(1))
    cache_with_the_real_client(work, hub, "a-1.json", revision="main")
    spec, offline = branch_spec(hub, "a-1.json"), {"HF_HUB_OFFLINE": "1"}
    assert work.acquire(spec, **offline).returncode == 0
    first = work.manifest()["files"][0]["sha256"]
    hub.move({"a-1.json": questions(3)})
    cache_with_the_real_client(work, hub, "a-1.json", revision="main")
    shutil.rmtree(work.data)
    assert work.acquire(spec, **offline).returncode == 0
    assert work.manifest()["files"][0]["sha256"] == first == sha(questions(1))


def test_files_of_a_pattern_that_are_not_known_here_can_not_be_had_offline(work, hub):
    files = [{"path": "data/*.json", "role": "annotations"}]
    done = work.acquire(hub_spec(hub, files=files), HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "HF_HUB_OFFLINE is set, and which files it has" in done.stderr


@pytest.mark.parametrize("more", [{"role": "images"}, {"sha256": "0" * 64}, {"bytes": 5}])
def test_what_is_of_one_file_does_not_go_with_a_pattern(work, hub, more):
    done = work.acquire(hub_spec(hub, files=[{"path": "data/*.json", "role": "annotations"} | more]))
    assert done.returncode == 1 and "'data/*.json' may be several files" in done.stderr


def test_a_second_run_needs_no_network_and_gives_the_same_manifest(work, hub):
    fill(hub)
    assert work.acquire(hub_spec(hub)).returncode == 0
    first = (work.data / "manifest.json").read_bytes()
    (work.data / "manifest.json").unlink()
    count = len(hub.requests)
    assert work.acquire(hub_spec(hub), HF_HUB_OFFLINE="1").returncode == 0
    assert (work.data / "manifest.json").read_bytes() == first
    assert work.acquire(hub_spec(hub)).returncode == 0
    assert len(hub.requests) == count


def test_damage_on_the_way_is_noticed(work, hub):
    """The client itself only compares sizes."""
    fill(hub)
    hub.files["images.zip"].faults = [Fault("flip")] * 4
    done = work.acquire(hub_spec(hub))
    assert done.returncode == 1
    assert f"{sha(ZIP)} is expected" in done.stderr
    assert not (work.data / "manifest.json").exists()
    assert (work.data / "anno.json").exists(), "what was fetched stays"


def test_interrupted_hub_files_are_resumed(work, hub):
    fill(hub)
    big = noise(2_000_000)
    hub.put("images.zip", ZIP + b"")
    hub.put("other.bin", big, faults=[Fault("reset", after=1_000_000), Fault("status", 503)])
    spec = hub_spec(hub)
    spec["files"].append({"path": "other.bin", "role": "other", "sha256": sha(big)})
    assert work.acquire(spec).returncode == 0
    got = hub.gets(hub.resolve_root + hub.commit + "/other.bin")
    assert got[-1]["Range"].startswith("bytes=")
    assert (work.data / "other.bin").read_bytes() == big


def test_a_busy_hub_is_asked_again(work, hub):
    fill(hub)
    hub.api_faults = [Fault("status", 500), Fault("status", 429, headers={"Retry_After": "0"})]
    assert work.acquire(hub_spec(hub)).returncode == 0


def test_tokens_reach_the_hub_but_no_file_log_or_other_host(work, hub, other_server):
    fill(hub)
    hub.token = "hf_verysecret"
    hub.cdn = other_server.url
    other_server.add("/images.zip", ZIP)
    other_server.add("/anno.json", JSON)
    done = work.acquire(hub_spec(hub), HF_TOKEN="hf_verysecret")
    assert done.returncode == 0, done.stderr
    assert all("Authorization" not in headers for _, _, headers in other_server.requests)
    assert len(other_server.requests) == 2
    written = "".join(path.read_text(errors="replace") for path in work.folder.rglob("*") if path.is_file())
    assert "hf_verysecret" not in written + done.stderr + done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repo": "owner/dat"}, "no such repository"),
        ({"revision": "v9"}, "no such revision"),
        ({"revision": "abcdef1"}, "is no commit of owner/data"),
        ({"files": [{"path": "image.zip", "role": "images"}]}, "it has images.zip"),
        (
            {"files": [{"path": "images.zip", "role": "images", "sha256": "0" * 64}]},
            "another file than the config",
        ),
        ({"files": [{"path": "images.zip", "role": "images", "bytes": 5}]}, f"size {len(ZIP)} (config: 5)"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_wrong_hub_specs_say_what_is_wrong(work, hub, change, message):
    fill(hub)
    done = work.acquire(hub_spec(hub, **change))
    assert done.returncode == 1
    assert message in done.stderr


def test_first_use_hashes_of_the_config_give_way_to_the_hubs(work, hub):
    fill(hub)
    files = [{"path": "images.zip", "role": "images", "sha256": "0" * 64, "trust": "first_use"}]
    done = work.acquire(hub_spec(hub, files=files))
    assert done.returncode == 0
    assert "warning" in done.stderr
    assert work.manifest()["files"][0]["sha256"] == sha(ZIP)


def cache_with_the_real_client(work, hub, *names, revision=None):
    """Fills the client's own cache as any other program of the user does."""
    code = (
        "import sys, huggingface_hub as h\nfor n in sys.argv[3:]: h.hf_hub_download(sys.argv[1], n,"
        " repo_type='dataset', revision=sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", code, hub.repo, revision or hub.commit, *names], env=work.env, check=True
    )


def test_the_clients_cache_is_used_in_place_and_verified(work, hub):
    fill(hub)
    cache_with_the_real_client(work, hub, "images.zip", "anno.json")
    before = len(hub.gets(hub.resolve_root + hub.commit + "/images.zip"))
    assert work.acquire(hub_spec(hub)).returncode == 0
    images = Path(work.manifest()["images"]["path"])
    assert images.is_absolute()
    assert images.is_relative_to(work.folder / "hf")
    assert len(hub.gets(hub.resolve_root + hub.commit + "/images.zip")) == before


def test_offline_with_a_cache_works_and_without_says_what_to_do(work, hub):
    fill(hub)
    cache_with_the_real_client(work, hub, "images.zip")
    short = hub_spec(hub, revision=hub.commit[:8])
    short["files"] = short["files"][:1]
    assert work.acquire(short, HF_HUB_OFFLINE="1").returncode == 0
    done = work.acquire(hub_spec(hub), HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "anno.json" in done.stderr
    assert "HF_HUB_OFFLINE is set" in done.stderr


def test_a_damaged_cache_is_not_used(work, hub):
    fill(hub)
    cache_with_the_real_client(work, hub, "images.zip", "anno.json")
    [blob] = [p for p in (work.folder / "hf").rglob("blobs/*") if p.read_bytes() == ZIP]
    blob.write_bytes(bytes([ZIP[0] ^ 1]) + ZIP[1:])
    done = work.acquire(hub_spec(hub))
    assert done.returncode == 0
    assert "not the expected content" in done.stderr
    assert work.manifest()["images"]["path"] == "images.zip"


def test_mirrors_of_hub_files(work, hub, other_server):
    """The hub lost the file; the mirror has it."""
    mirror = other_server.add("/copy/images.zip", ZIP)
    hub.tags = set()
    files = [{"path": "images.zip", "role": "images", "sha256": sha(ZIP), "mirrors": [mirror]}]
    done = work.acquire(hub_spec(hub, files=files, revision=hub.commit))
    assert done.returncode == 0, done.stderr
    assert work.manifest()["files"][0]["url"] == mirror


def test_several_url_files_and_the_manifest_of_a_second_run(tmp_path, server):
    work = Acquiring(tmp_path)
    spec = {
        "kind": "url",
        "files": [
            {"url": server.add("/zips/train.zip", ZIP), "role": "images", "sha256": sha(ZIP)},
            {
                "url": [server.url + "/gone.json", server.add("/a.json", JSON)],
                "role": "annotations",
                "name": "a.json",
            },
        ],
    }
    assert work.acquire(spec).returncode == 0
    first = work.manifest()
    assert first["images"]["path"] == "train.zip"
    assert work.acquire(spec).returncode == 0
    assert work.manifest() == first
    assert first["files"][0]["time"]


def test_the_local_copy_takes_the_downloads_place(tmp_path, server):
    work = Acquiring(tmp_path)
    mine = tmp_path / "mine.zip"
    mine.write_bytes(ZIP)
    spec = {
        "kind": "url",
        "files": [
            {"url": server.url + "/train.zip", "role": "images"},
            {"url": server.add("/a.json", JSON), "role": "annotations"},
        ],
        "local": {"images": str(mine)},
    }
    assert work.acquire(spec).returncode == 0
    manifest = work.manifest()
    assert manifest["images"] == {"type": "zip", "path": str(mine)}
    assert manifest["annotations"][0]["path"] == "a.json"
    assert not server.gets("/train.zip")


def test_the_local_copy_is_verified_when_its_hash_is_known(tmp_path):
    work = Acquiring(tmp_path)
    mine = tmp_path / "train.zip"
    mine.write_bytes(archive("other.jpg"))
    file = {"url": "http://127.0.0.1:9/train.zip", "role": "images", "sha256": sha(ZIP)}
    done = work.acquire({"kind": "url", "files": [file], "local": {"images": str(mine)}})
    assert done.returncode == 1
    assert sha(ZIP) in done.stderr


def test_path_sources(tmp_path):
    work = Acquiring(tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(encoded())
    (tmp_path / "a.json").write_bytes(JSON)
    spec = {"kind": "path", "images": str(folder), "annotations": [str(tmp_path / "a.json")]}
    assert work.acquire(spec).returncode == 0
    first = work.manifest()
    assert first["images"] == {"type": "folder", "path": str(folder)}
    assert work.acquire(spec).returncode == 0
    assert work.manifest() == first
    (folder / "b.jpg").write_bytes(encoded(seed=1))
    assert work.acquire(spec).returncode == 0
    assert work.manifest()["digest"] != first["digest"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "path", "images": "/nowhere/x.zip"}, "there is no such file or folder"),
        ({"kind": "path", "annotations": "/nowhere/x.json"}, "/nowhere/x.json is no file"),
    ],
)
def test_path_sources_that_are_not_there(tmp_path, spec, message):
    done = Acquiring(tmp_path).acquire(spec)
    assert done.returncode == 1
    assert message in done.stderr


def test_the_demos_shapes_are_a_source_like_others(tmp_path):
    work = Acquiring(tmp_path)
    assert work.acquire({"kind": "shapes", "split": "captions", "pictures": 5}).returncode == 0
    first = work.manifest()
    assert first["images"]["type"] == "zip"
    assert work.acquire({"kind": "shapes", "split": "captions", "pictures": 5}).returncode == 0
    assert work.manifest() == first


SNAPSHOT = """
import sys
from pathlib import Path
from workflow_scripts.acquire.hub import fetch_snapshot
from workflow_scripts.io import user_errors
with user_errors():
    pick = lambda names: [n for n in names if not n.endswith(".md")]
    commit, found = fetch_snapshot(sys.argv[1], sys.argv[2], Path("download"), choose=pick)
    print(commit, *(f"{path.resolve()}={facts['sha256']}" for path, facts in found))
"""


def test_a_whole_model_repository(tmp_path):
    """Chosen files only, verified, from the network or the client's cache, offline too."""
    with HubServer("owner/model", "model").running() as hub:
        fill(hub)
        hub.put("config.json", b"{}", lfs=False)
        work = Acquiring(tmp_path, hub.url)

        def snapshot(**env):
            command = [sys.executable, "-c", SNAPSHOT, hub.repo, hub.commit[:8]]
            done = subprocess.run(
                command, cwd=tmp_path, env=work.env | env, capture_output=True, text=True, check=False
            )
            assert "Traceback" not in done.stderr, done.stderr
            return done

        expected = {sha(ZIP), sha(JSON), sha(b"{}")}
        first = snapshot().stdout.split()
        assert first[0] == hub.commit
        assert {item.split("=")[1] for item in first[1:]} == expected
        gets = len(hub.requests)
        assert snapshot().stdout.split() == first
        assert not [r for r in hub.requests[gets:] if "/resolve/" in r[1]], "nothing is fetched again"
        assert snapshot(HF_HUB_OFFLINE="1").stdout.split() == first
        shutil.rmtree(tmp_path / "download")
        assert "HF_HUB_OFFLINE is set" in snapshot(HF_HUB_OFFLINE="1").stderr
        code = "import sys, huggingface_hub as h; h.snapshot_download(sys.argv[1], revision=sys.argv[2])"
        subprocess.run([sys.executable, "-c", code, hub.repo, hub.commit], env=work.env, check=True)
        offline = snapshot(HF_HUB_OFFLINE="1").stdout.split()
        assert {item.split("=")[1] for item in offline[1:]} == expected


def test_a_hub_that_refuses_without_saying_why_names_the_token(work, hub):
    fill(hub)
    hub.api_faults = [Fault("status", 401)]
    done = work.acquire(hub_spec(hub))
    assert done.returncode == 1
    assert (
        "HTTP 401" in done.stderr and "set HF_TOKEN" in done.stderr and f"{hub.url}/datasets/" in done.stderr
    )


@pytest.mark.parametrize(
    ("code", "what_to_do"),
    [(None, "set HF_TOKEN"), ("GatedRepo", "accept them on"), ("EntryNotFound", "check `path`")],
)
def test_a_hubs_file_that_is_refused_names_what_to_do(work, hub, code, what_to_do):
    fill(hub)
    hub.files["images.zip"].faults = [Fault("status", 403, headers={"X_Error_Code": code})]
    done = work.acquire(hub_spec(hub))
    assert done.returncode == 1
    assert "HTTP 403" in done.stderr and what_to_do in done.stderr


# ---------------------------------------------------------------- secrets


def test_a_signature_comes_from_the_environment_and_stays_there(tmp_path, server):
    """In the query or in the path; the server gets it, nobody else does."""
    work = Acquiring(tmp_path)
    server.add("/geheim/1/a.json", JSON)
    url = server.url + "/${PLACE}/a.json?sig=${SIG}&dl=1"
    done = work.acquire(
        {"kind": "url", "files": [{"url": url, "role": "annotations"}]},
        SIG="top+geheim/2==",
        PLACE="geheim/1",
    )
    assert done.returncode == 0, done.stderr
    assert server.requests[0][1] == "/geheim/1/a.json?sig=top+geheim/2==&dl=1"
    written = "".join(path.read_text(errors="replace") for path in work.folder.rglob("*") if path.is_file())
    assert "geheim" not in written + done.stderr
    assert work.manifest()["files"][0]["url"] == server.url + "/${PLACE}/a.json"


def test_a_failing_request_keeps_the_signature_to_itself(tmp_path, server):
    work = Acquiring(tmp_path)
    server.add("/a.json", JSON, faults=[Fault("redirect", "http://[bad/geheim2?x=geheim3")])
    url = [server.url + "/a.json?sig=${SIG}", server.url + "/no/${SIG}/b.json"]
    done = work.acquire({"kind": "url", "files": [{"url": url, "role": "annotations"}]}, SIG="geheim1")
    assert done.returncode == 1
    assert "geheim" not in done.stderr
    assert "no address that can be fetched" in done.stderr and "HTTP 404" in done.stderr


def test_a_variable_that_is_not_set_is_named(tmp_path, server):
    url = server.url + "/a.json?sig=${NOT_SET_AT_ALL}"
    done = Acquiring(tmp_path).acquire({"kind": "url", "files": [{"url": url, "role": "annotations"}]})
    assert done.returncode == 1
    assert "NOT_SET_AT_ALL is not set; export it" in done.stderr


def test_a_literal_signature_is_refused_without_being_repeated(tmp_path):
    url = "https://user:geheim1@example.org/a.json?sig=geheim2"
    done = Acquiring(tmp_path).acquire({"kind": "url", "files": [{"url": url, "role": "annotations"}]})
    assert done.returncode == 1
    assert "~/.netrc" in done.stderr and "geheim" not in done.stderr
