"""Ctrl-C and SIGTERM end a download at once, whatever it waits for, and the next one goes on from there."""

from __future__ import annotations

import signal
import time

import pytest

from tests.support.acquiring import Acquiring
from tests.support.pictures import noise
from tests.support.servers import Fault, HubServer

DATA = noise(3_000_000)
SOON = 10
"""Seconds; what the servers here make a download wait for takes minutes."""
MINUTES = 300


def url_spec(server, fault, **more):
    files = []
    for name in ("a.bin", "b.bin", "c.bin"):
        faults = [Fault(fault.kind, fault.value, fault.after, fault.headers)]
        files.append({"url": server.add(f"/{name}", DATA, faults=faults), "role": "other"})
    return {"kind": "url", "files": files, "connections_per_host": 2} | more


def told(work, server, spec, number, ready):
    """Starts, waits until ``ready``, sends the signal; returns what was said."""
    process = work.start(spec)
    deadline = time.monotonic() + 30
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ready(), "the download did not come so far"
    process.send_signal(number)
    _, said = process.communicate(timeout=SOON)
    assert process.returncode == 128 + number, said
    assert f"stopped by {number.name}" in said
    assert "Traceback" not in said and "Fatal" not in said
    return said


WAITS = {
    "bytes that come slowly": Fault("drip", 0.01),
    "an answer": Fault("hang", MINUTES),
    "a pause that the server asked for": Fault("status", 503, headers={"Retry_After": str(MINUTES)}),
    "a silent connection": Fault("stall", MINUTES, after=100_000),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("fault", WAITS.values(), ids=WAITS)
def test_all_files_of_a_source_end_at_once(tmp_path, server, fault, number):
    """Two of them hold a connection, the third waits for one."""
    work = Acquiring(tmp_path)
    told(work, server, url_spec(server, fault), number, lambda: len(server.requests) >= 2)


def test_what_came_is_kept_and_the_next_run_goes_on(tmp_path, server):
    work = Acquiring(tmp_path)
    spec = url_spec(server, Fault("slow", 0.2), connections_per_host=3)
    part = work.data / "a.bin.part"
    told(work, server, spec, signal.SIGTERM, lambda: part.exists() and part.stat().st_size > 200_000)
    kept = part.stat().st_size
    for resource in server.resources.values():
        resource.faults.clear()
    done = work.acquire(spec)
    assert done.returncode == 0, done.stderr
    assert (work.data / "a.bin").read_bytes() == DATA
    assert server.gets("/a.bin")[-1]["Range"] == f"bytes={kept}-"


def test_a_hub_that_does_not_answer_is_no_reason_to_stay(tmp_path):
    with HubServer().running() as hub:
        hub.put("a.bin", DATA)
        hub.api_faults = [Fault("hang", MINUTES)]
        files = [{"path": "a.bin", "role": "other"}]
        spec = {"kind": "hub", "repo": hub.repo, "revision": hub.commit, "files": files}
        told(Acquiring(tmp_path, hub.url), hub, spec, signal.SIGINT, lambda: hub.requests)


def test_a_model_that_is_fetched_ends_at_once_too(tmp_path):
    with HubServer("owner/model", "model").running() as hub:
        hub.put("model.bin", DATA)
        hub.api_faults = [Fault("hang", MINUTES)]
        spec = {"kind": "hub", "role": "llm", "repo": hub.repo, "revision": hub.commit}
        work = Acquiring(tmp_path, hub.url, step="prepare_model")
        told(work, hub, spec, signal.SIGTERM, lambda: hub.requests)
