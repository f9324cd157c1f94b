"""Downloads under Snakemake: they end with it, outlive its death, rerun for nothing, give no secret away."""

import contextlib
import json
import os
import re
import signal
import threading
from pathlib import Path

import pytest

from tests.support.pictures import noise
from tests.support.servers import Fault, Server
from tests.support.workspace import Workspace, kill_group, wait_for
from workflow_scripts.config.shapes import ShapesSource
from workflow_scripts.demo.shapes import generate

pytestmark = pytest.mark.slow
SECRET = "geheim-0123456789"
TARGET = "data/sources/captions/manifest.json"
BIG = noise(3_000_000)


@pytest.fixture
def server():
    with Server().running() as running:
        yield running


@pytest.fixture
def other_server():
    with Server().running() as running:
        yield running


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The bytes of an archive and of its annotations."""
    folder = tmp_path_factory.mktemp("drawn")
    found = generate(ShapesSource(split="captions", pictures=20, seed=1), folder)
    paths = [found["images"]["path"], found["annotations"][0]["path"]]
    return [(folder / path).read_bytes() for path in paths]


def workspace_for(tmp_path, *files, **environment):
    """A working folder whose captions come from the network."""
    workspace = Workspace(tmp_path / "w", environment=environment).draw()
    workspace.config["sources"]["captions"] = {"kind": "url", "files": list(files)}
    return workspace


def part(workspace, name="big.bin"):
    return workspace.folder / f"data/sources/captions/{name}.part"


def size(path):
    return path.stat().st_size if path.exists() else 0


def processes(step, manifest):
    """The process ids of a step that has this manifest in its command, of these tests only."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            arguments = path.read_text(errors="replace").split("\0")
            if (
                arguments[1:3] == ["-m", "workflow_scripts.step"]
                and step in arguments
                and manifest in arguments
            ):
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("whom", ["snakemake alone", "all, as a terminal does"])
def test_a_signal_to_snakemake_ends_its_downloads(tmp_path, server, number, whom):
    """Without being told they would go on for half an hour."""
    slow = {"url": server.add("/big.bin", BIG, faults=[Fault("slow", 40)]), "role": "other"}
    drip = {"url": server.add("/more.bin", BIG, faults=[Fault("drip", 0.001)]), "role": "other"}
    workspace = workspace_for(tmp_path, slow, drip)
    process = workspace.start(TARGET)
    wait_for(lambda: size(part(workspace, "more.bin")) > 100, 60, "the first bytes", process)
    (os.kill if whom == "snakemake alone" else os.killpg)(process.pid, number)
    process.wait(timeout=20)
    said = (workspace.folder / "snakemake.out").read_text()
    assert f"stopped by {number.name}" in said
    assert "Traceback" not in said
    assert not processes("acquire", TARGET)
    assert size(part(workspace, "more.bin")) > 100


def test_the_orphan_of_a_killed_snakemake_is_waited_for(tmp_path, server):
    url = server.add("/big.bin", BIG, faults=[Fault("slow", 0.3)])
    workspace = workspace_for(tmp_path, {"url": url, "role": "other"})
    process = workspace.start(TARGET)
    wait_for(lambda: size(part(workspace)) > 0, 60, "the first bytes", process)
    kill_group(process)
    done = workspace.run(TARGET)
    assert re.search(r"big.bin: waiting for process \d+ on .*, which is fetching it", done.stdout)
    assert len(server.gets("/big.bin")) == 1, "the orphan's file was taken"
    assert (workspace.folder / "data/sources/captions/big.bin").read_bytes() == BIG


def test_neither_another_mirror_nor_a_later_hash_makes_data_again(tmp_path, server, drawn):
    """The second table of docs/reruns.md, as Snakemake sees it."""
    images, annotations = ({"role": role} for role in ("images", "annotations"))
    images["url"], annotations["url"] = (
        server.add(f"/{n}", d) for n, d in zip(("a.zip", "a.json"), drawn, strict=True)
    )
    workspace = workspace_for(tmp_path, images, annotations)
    wanted = ["data/mixtures/pretrain/manifest.json"]
    workspace.run(*wanted)
    before = sorted(workspace.plan().by_name)
    hashes = {Path(file["path"]).name: file["sha256"] for file in workspace.json(TARGET)["files"]}
    files = workspace.config["sources"]["captions"]["files"]
    files[0] |= {"sha256": hashes["a.zip"], "url": ["https://elsewhere.example/b.zip", server.url + "/a.zip"]}
    files[1] |= {"sha256": hashes["a.json"]}
    assert workspace.planned(*wanted) == []
    assert sorted(workspace.plan().by_name) == before
    files[1] |= {"sha256": "0" * 64}
    assert "acquire: " + TARGET in workspace.planned(*wanted)


def command_lines(stop, found):
    """Collects the command lines of all processes until ``stop`` is set."""
    while not stop.wait(0.01):
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                found.add(path.read_bytes())
            except OSError:
                continue


def test_no_secret_is_left_anywhere(tmp_path, server, other_server, drawn):
    """Neither by a run that fails nor by one that finishes, in no file and in no list of processes."""
    server.add(
        "/a.zip",
        drawn[0],
        faults=[Fault("redirect", f"{other_server.url}/a.zip?X-Amz-Signature={SECRET}")] * 9,
    )
    other_server.add("/a.zip", drawn[0], faults=[Fault("slow", 0.5)])
    server.add(f"/{SECRET}/a.json", drawn[1], faults=[Fault("status", 403)] * 4)
    files = [
        {"url": server.url + "/a.zip?sig=${SIGNATURE}", "role": "images"},
        {"url": server.url + "/${SIGNATURE}/a.json", "role": "annotations"},
    ]
    workspace = workspace_for(tmp_path, *files, SIGNATURE=SECRET)
    stop, seen = threading.Event(), set()
    watching = threading.Thread(target=command_lines, args=(stop, seen))
    watching.start()
    failed = workspace.run("-p", "--verbose", TARGET, check=False)
    finished = workspace.run("-p", "--verbose", TARGET)
    stop.set()
    watching.join()
    assert failed.returncode != 0 and "HTTP 403" in failed.stdout
    left = [path for path in workspace.folder.rglob("*") if path.is_file()]
    assert any(".snakemake/metadata" in str(path) for path in left)
    assert any(path.parts[-2:] == ("acquire", "captions.log") for path in left)
    assert not [path for path in left if SECRET.encode() in path.read_bytes()]
    assert SECRET not in failed.stdout + finished.stdout
    assert any(b"workflow_scripts.step" in line and b"acquire" in line for line in seen)
    assert not [line for line in seen if SECRET.encode() in line and b"pytest" not in line]
    asked = json.dumps([path for _, path, _ in server.requests + other_server.requests])
    assert asked.count(SECRET) > 2, "the servers did get it"


def test_a_step_that_is_killed_is_tried_once_more(tmp_path, server, drawn):
    """The scan, as the kernel kills it when memory is short."""
    images = {"url": server.add("/a.zip", drawn[0]), "role": "images"}
    workspace = workspace_for(tmp_path, images)
    process = workspace.start("data/scans/captions/manifest.json")
    os.kill(wait_for(lambda: processes("scan", TARGET), 60, "the scan", process)[0], signal.SIGKILL)
    process.wait(timeout=120)
    said = (workspace.folder / "snakemake.out").read_text()
    assert process.returncode == 0, said
    assert "Trying to restart job" in said
