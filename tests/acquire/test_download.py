"""Downloads against a real server with faults: each ends in a verified file or in an error that says what
to do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.pictures import noise
from tests.support.servers import Fault
from workflow_scripts.acquire.download import fetch
from workflow_scripts.acquire.locks import host_slot
from workflow_scripts.acquire.patience import Patience, retry_after
from workflow_scripts.acquire.verified import Wanted
from workflow_scripts.io import UserError, read_json

DATA = noise(3_000_000)
SHA = hashlib.sha256(DATA).hexdigest()
ROOT = Path(__file__).parents[2]


def want(*urls, **known):
    return Wanted("images.zip", urls, **{"bytes": len(DATA), "sha256": SHA} | known)


def ranges(server, path="/images.zip"):
    return [headers.get("Range") for headers in server.gets(path)]


def test_a_plain_download_is_verified_named_and_remembered(server, tmp_path, patience):
    url = server.add("/images.zip", DATA)
    found = fetch(want(url), tmp_path / "images.zip", patience)
    assert (tmp_path / "images.zip").read_bytes() == DATA
    assert found["sha256"] == SHA
    assert found["verified"]
    assert found["etag"] == '"v1"'
    assert found["url"] == url
    assert not list(tmp_path.glob("*.part*"))


def test_a_second_call_asks_nobody_and_hashes_nothing(server, tmp_path, patience):
    url = server.add("/images.zip", DATA)
    first = fetch(want(url), tmp_path / "images.zip", patience)
    assert fetch(want(url), tmp_path / "images.zip", patience) == first
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "fault",
    [Fault("cut", after=1_000_000), Fault("reset", after=1_000_000), Fault("stall", 1.0, after=1_000_000)],
    ids=lambda fault: fault.kind,
)
@pytest.mark.parametrize("known", [{}, {"sha256": None, "bytes": None}], ids=["pinned", "unpinned"])
def test_a_broken_connection_is_resumed_where_it_broke(server, tmp_path, patience, fault, known):
    url = server.add("/images.zip", DATA, faults=[Fault(fault.kind, fault.value, fault.after)])
    fetch(want(url, **known), tmp_path / "images.zip", patience)
    assert (tmp_path / "images.zip").read_bytes() == DATA
    first, second = ranges(server)
    assert first is None
    assert 0 < int(second.removeprefix("bytes=").rstrip("-")) <= 1_000_000


def test_progress_keeps_hope_alive(server, tmp_path, patience):
    """Ten breaks, more than the attempts allowed in a row, but each brought something."""
    url = server.add("/images.zip", DATA, faults=[Fault("cut", after=200_000) for _ in range(10)])
    fetch(want(url), tmp_path / "images.zip", patience)
    assert (tmp_path / "images.zip").read_bytes() == DATA


def test_unpinned_files_are_resumed_only_if_unchanged(server, tmp_path, patience):
    new = noise(3_000_000, seed=1)
    url = server.add(
        "/images.zip", DATA, faults=[Fault("cut", after=1_000_000), Fault("change", (new, '"v2"'))]
    )
    fetch(want(url, sha256=None, bytes=None), tmp_path / "images.zip", patience)
    assert (tmp_path / "images.zip").read_bytes() == new
    assert server.gets("/images.zip")[1]["If-Range"] == '"v1"'


def test_a_server_that_ignores_if_range_does_not_mix_versions(server, tmp_path, patience):
    new = noise(3_000_000, seed=1)
    faults = [Fault("cut", after=1_000_000), Fault("change", (new, '"v2"'))]
    url = server.add("/images.zip", DATA, faults=faults, honours_if_range=False)
    fetch(want(url, sha256=None, bytes=None), tmp_path / "images.zip", patience)
    assert (tmp_path / "images.zip").read_bytes() == new


def test_a_server_without_ranges_still_gives_the_file(server, tmp_path, patience):
    url = server.add("/images.zip", DATA, ranges=False, faults=[Fault("cut", after=1_000_000)])
    fetch(want(url), tmp_path / "images.zip", patience)
    assert (tmp_path / "images.zip").read_bytes() == DATA


def test_no_length_and_no_etag(server, tmp_path, patience):
    url = server.add(
        "/images.zip", DATA, says_length=False, etag=None, faults=[Fault("reset", after=1_000_000)]
    )
    fetch(want(url, bytes=None, sha256=None), tmp_path / "images.zip", patience)
    assert (tmp_path / "images.zip").read_bytes() == DATA


def test_a_complete_part_needs_no_request(server, tmp_path, patience):
    (tmp_path / "images.zip.part").write_bytes(DATA)
    fetch(want(server.url + "/images.zip"), tmp_path / "images.zip", patience)
    assert not server.requests


def test_a_part_of_something_else_is_found_out_by_the_hash(server, tmp_path, patience):
    (tmp_path / "images.zip.part").write_bytes(noise(1000, seed=5))
    url = server.add("/images.zip", DATA)
    fetch(want(url), tmp_path / "images.zip", patience)
    assert (tmp_path / "images.zip").read_bytes() == DATA
    assert ranges(server) == ["bytes=1000-", None]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_busy_servers_are_asked_again(server, tmp_path, patience, status):
    url = server.add("/images.zip", DATA, faults=[Fault("status", status), Fault("status", status)])
    fetch(want(url), tmp_path / "images.zip", patience)
    assert len(server.requests) == 3


def test_retry_after_is_obeyed(server, tmp_path, patience):
    url = server.add("/images.zip", DATA, faults=[Fault("status", 503, headers={"Retry_After": "1"})])
    start = time.monotonic()
    fetch(want(url), tmp_path / "images.zip", patience)
    assert time.monotonic() - start >= 1


def test_retry_after_can_be_a_date():
    from datetime import UTC, datetime

    now = datetime(2024, 1, 1, 12, 0, 0, tzinfo=UTC)
    assert retry_after("Mon, 01 Jan 2024 12:00:30 GMT", now) == 30
    assert retry_after("Mon, 01 Jan 2024 11:00:00 GMT", now) == 0
    assert retry_after("nonsense") is None
    assert retry_after("999999") == 3600


def test_mirrors_are_tried_in_order_and_a_part_goes_on_at_the_next(server, other_server, tmp_path, patience):
    faults = [Fault("cut", after=1_000_000)] + [Fault("status", 500)] * 9
    first = server.add("/images.zip", DATA, faults=faults)
    second = other_server.add("/copy.zip", DATA, etag='"other"')
    found = fetch(want(first, second), tmp_path / "images.zip", patience)
    assert (tmp_path / "images.zip").read_bytes() == DATA
    assert found["url"] == second
    assert ranges(other_server, "/copy.zip")[0].startswith("bytes=")


def test_unpinned_parts_do_not_cross_mirrors(server, other_server, tmp_path, patience):
    first = server.add(
        "/images.zip", DATA, faults=[Fault("cut", after=1_000_000)] + [Fault("status", 500)] * 9
    )
    new = noise(2_500_000, seed=3)
    second = other_server.add("/copy.zip", new, etag='"v1"')
    fetch(want(first, second, sha256=None, bytes=None), tmp_path / "images.zip", patience)
    assert (tmp_path / "images.zip").read_bytes() == new


def test_gone_everywhere(server, other_server, tmp_path, patience):
    with pytest.raises(UserError) as error:
        fetch(
            want(server.url + "/images.zip", other_server.url + "/x.zip"), tmp_path / "images.zip", patience
        )
    assert "404" in str(error.value)
    assert other_server.url in str(error.value)
    assert "`local`" in str(error.value)
    assert len(server.requests) == len(other_server.requests) == 1


def test_nobody_answers(tmp_path, patience):
    with pytest.raises(UserError, match="3 attempts"):
        fetch(want("http://127.0.0.1:9/images.zip"), tmp_path / "images.zip", patience)


def test_a_web_page_with_status_200_is_not_the_file(server, tmp_path, patience):
    url = server.add("/images.zip", DATA, faults=[Fault("html")])
    with pytest.raises(UserError, match="web page instead of the file"):
        fetch(want(url, bytes=None, sha256=None), tmp_path / "images.zip", patience)
    assert not list(tmp_path.glob("images.zip*"))


def test_a_web_page_while_resuming_keeps_what_was_fetched(server, tmp_path, patience):
    url = server.add("/images.zip", DATA, faults=[Fault("cut", after=1_000_000), Fault("html")])
    with pytest.raises(UserError, match=r"1\.0 MB are kept"):
        fetch(want(url), tmp_path / "images.zip", patience)
    assert (tmp_path / "images.zip.part").stat().st_size > 0
    fetch(want(url), tmp_path / "images.zip", patience)
    assert (tmp_path / "images.zip").read_bytes() == DATA


def test_another_size_is_refused_before_it_is_fetched(server, tmp_path, patience):
    url = server.add("/images.zip", DATA)
    with pytest.raises(UserError, match=f"{len(DATA)} bytes, 5 are expected"):
        fetch(want(url, bytes=5), tmp_path / "images.zip", patience)
    assert not (tmp_path / "images.zip.part").exists()


def test_a_wrong_hash_is_an_error_and_the_evidence_is_kept(server, tmp_path, patience):
    url = server.add("/images.zip", DATA, faults=[Fault("flip")])
    with pytest.raises(UserError, match=f"{SHA} is expected") as error:
        fetch(want(url), tmp_path / "images.zip", patience)
    assert not (tmp_path / "images.zip").exists()
    [evidence] = tmp_path.glob("images.zip.wrong-*")
    assert evidence.name in str(error.value)
    assert evidence.stat().st_size == len(DATA)


def test_a_wrong_file_over_a_bad_line_is_not_fetched_for_ever(server, tmp_path, patience):
    """Each copy is resumed once, so each could be blamed on its resumption."""
    url = server.add(
        "/images.zip", noise(len(DATA), seed=9), faults=[Fault("cut", after=1_000_000), None] * 20
    )
    with pytest.raises(UserError, match="is expected"):
        fetch(want(url), tmp_path / "images.zip", patience)
    assert len(server.requests) == 4, "two copies, each in two pieces"


def test_a_wrong_copy_on_one_mirror_does_not_matter(server, other_server, tmp_path, patience):
    first = server.add("/images.zip", DATA, faults=[Fault("flip")])
    second = other_server.add("/images.zip", DATA)
    assert fetch(want(first, second), tmp_path / "images.zip", patience)["url"] == second


def test_first_use_hashes_only_warn(server, tmp_path, patience, capsys):
    url = server.add("/images.zip", DATA)
    found = fetch(want(url, sha256="0" * 64, bytes=7, first_use=True), tmp_path / "images.zip", patience)
    assert found["sha256"] == SHA
    assert not found["verified"]
    assert "warning" in capsys.readouterr().err


def test_a_file_that_was_put_there_by_hand_is_verified_and_taken(server, tmp_path, patience):
    (tmp_path / "images.zip").write_bytes(DATA)
    found = fetch(want(server.url + "/images.zip"), tmp_path / "images.zip", patience)
    assert found["sha256"] == SHA
    assert not server.requests


def test_a_wrong_file_in_the_place_is_set_aside(server, tmp_path, patience):
    (tmp_path / "images.zip").write_bytes(b"old")
    url = server.add("/images.zip", DATA)
    fetch(want(url), tmp_path / "images.zip", patience)
    assert (tmp_path / "images.zip").read_bytes() == DATA
    assert [path.read_bytes() for path in tmp_path.glob("images.zip.wrong-*")] == [b"old"]


def test_tokens_go_to_the_first_host_only(server, other_server, tmp_path, patience, capfd):
    target = other_server.add("/signed.zip", DATA)
    url = server.add("/images.zip", DATA, faults=[Fault("redirect", target + "?signature=secret1")])
    headers = {"Authorization": "Bearer secret2"}
    fetch(want(url, headers=headers), tmp_path / "images.zip", patience)
    assert server.gets("/images.zip")[0]["Authorization"] == "Bearer secret2"
    assert "Authorization" not in other_server.gets("/signed.zip")[0]
    written = "".join(path.read_text(errors="replace") for path in tmp_path.glob(".*"))
    assert "secret" not in written + capfd.readouterr().err


def test_mirrors_get_no_token(server, other_server, tmp_path, patience):
    mirror = other_server.add("/images.zip", DATA)
    fetch(
        want(server.url + "/images.zip", mirror, headers={"Authorization": "Bearer x"}),
        tmp_path / "f",
        patience,
    )
    assert "Authorization" not in other_server.gets("/images.zip")[0]


SCRIPT = """
import sys
from pathlib import Path
from workflow_scripts.acquire.download import fetch
from workflow_scripts.acquire.patience import Patience
from workflow_scripts.acquire.verified import Wanted
from workflow_scripts.io import user_errors
url, target, size, sha = sys.argv[1:]
with user_errors():
    fetch(Wanted("images.zip", (url,), int(size), sha), Path(target), Patience(attempts=2, backoff_s=0.01))
"""


def start(url, target, **options):
    command = [sys.executable, "-c", SCRIPT, url, str(target), str(len(DATA)), SHA]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)


def test_a_killed_download_goes_on(server, tmp_path):
    url = server.add("/images.zip", DATA, faults=[Fault("slow", 0.05)])
    process = start(url, tmp_path / "images.zip")
    part = tmp_path / "images.zip.part"
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size > 500_000) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = part.stat().st_size
    assert 0 < kept < len(DATA)
    assert not (tmp_path / "images.zip").exists()
    assert start(url, tmp_path / "images.zip").wait() == 0
    assert (tmp_path / "images.zip").read_bytes() == DATA
    assert ranges(server)[-1] == f"bytes={kept}-"


def test_a_full_disk_keeps_what_was_fetched(server, tmp_path):
    """The kernel refuses to write on: a file size limit gives the same kind of error as a full disk or
    quota.
    """
    url = server.add("/images.zip", DATA)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = start(url, tmp_path / "images.zip", preexec_fn=limit)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "disk is full" in errors
    assert "Traceback" not in errors
    assert (tmp_path / "images.zip.part").stat().st_size == 1_500_000
    assert start(url, tmp_path / "images.zip").wait() == 0
    assert (tmp_path / "images.zip").read_bytes() == DATA
    assert ranges(server)[-1] == "bytes=1500000-"


def test_a_file_larger_than_the_disk_is_refused_before_it_is_fetched(tmp_path):
    from workflow_scripts.disk import check_disk

    with pytest.raises(UserError, match="GB free"):
        check_disk(tmp_path, 1 << 60, "images.zip")


def test_who_comes_second_waits_for_the_first_and_takes_its_file(server, tmp_path, patience, capfd):
    """The first may be the orphan of a Snakemake that was killed."""
    url = server.add("/images.zip", DATA, faults=[Fault("slow", 0.05)])
    process = start(url, tmp_path / "images.zip")
    while not (tmp_path / "images.zip.part").exists():
        time.sleep(0.02)
    fetch(want(url), tmp_path / "images.zip", dataclasses.replace(patience, say_s=0.3))
    assert process.wait() == 0
    assert len(server.requests) == 1
    said = [
        line
        for line in capfd.readouterr().err.splitlines()
        if f"waiting for process {process.pid} on" in line
    ]
    assert len(said) > 1 and said[-1].endswith(" s"), said


def test_connections_per_host_are_limited_among_processes(server, tmp_path):
    """Three files, three processes, one connection: never two at a time."""
    command = SCRIPT.replace(
        "attempts=2,", f"attempts=2, per_host=1, hosts=Path({str(tmp_path / 'hosts')!r}),"
    )
    running = []
    for number in range(3):
        url = server.add(f"/{number}.zip", DATA, faults=[Fault("slow", 0.005)])
        arguments = [sys.executable, "-c", command, url, str(tmp_path / f"{number}.zip"), str(len(DATA)), SHA]
        running.append(subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL))
    assert [process.wait() for process in running] == [0, 0, 0]
    assert server.most_active == 1


def test_a_slot_is_free_again_after_its_holder_died(tmp_path):
    patience = Patience(per_host=1, hosts=tmp_path)
    child = os.fork()
    if child == 0:
        manager = host_slot("http://example.org/", patience)
        manager.__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with host_slot("http://example.org/", patience):
        pass


def test_provenance_forgets_a_file_that_was_changed(server, tmp_path, patience):
    url = server.add("/images.zip", DATA)
    target = tmp_path / "images.zip"
    fetch(want(url), target, patience)
    assert read_json(tmp_path / ".images.zip.provenance.json")["sha256"] == SHA
    target.write_bytes(DATA[:-1])
    fetch(want(url), target, patience)
    assert target.read_bytes() == DATA
