"""Servers at their worst: each download ends in the file, in one version, or within a bound in a sentence."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from contextlib import nullcontext

import pandas as pd
import pytest

from tests.support.pictures import encoded, noise
from tests.support.servers import Fault
from workflow_scripts.acquire.download import OVERLAP, fetch
from workflow_scripts.acquire.patience import Patience
from workflow_scripts.acquire.verified import Wanted
from workflow_scripts.io import UserError

OLD = noise(400_000)
NEW = OLD[:100_000] + noise(300_000, seed=1)
SHA = hashlib.sha256(OLD).hexdigest()


def get(server_url, tmp_path, patience, **known):
    """Fetches a file of which nothing is known but what is given."""
    fetch(Wanted("f.bin", (server_url,), **known), tmp_path / "f.bin", patience)
    return (tmp_path / "f.bin").read_bytes()


def refused(server_url, tmp_path, patience, **known):
    """What is said where no file comes out."""
    with pytest.raises(UserError) as error:
        get(server_url, tmp_path, patience, **known)
    assert not (tmp_path / "f.bin").exists()
    return str(error.value)


def ranges(server):
    return [headers.get("Range") for headers in server.gets("/f.bin")]


# ---------------------------------------------------------------- never two versions in one file

CUT = 300_000
VERSIONS = {
    "nothing said, bytes compared": {"etag": None},
    "another size": {"etag": None, "last_modified": None, "new": NEW + b"more"},
    "a weak ETag": {"etag": 'W/"v1"', "new_etag": 'W/"v1"'},
    "another ETag, If-Range ignored": {"honours_if_range": False, "new_etag": '"v2"'},
    "no ranges": {"ranges": False, "etag": None},
    "no ranges, no length": {"ranges": False, "etag": None, "says_length": False},
}


@pytest.mark.parametrize("case", VERSIONS.values(), ids=VERSIONS)
def test_a_file_that_changes_in_between_is_never_mixed(server, tmp_path, patience, capfd, case):
    new, etag = case.get("new", NEW), case.get("new_etag", case.get("etag"))
    options = {key: value for key, value in case.items() if not key.startswith("new")}
    kind = "cut" if options.get("says_length", True) else "reset"
    faults = [Fault(kind, after=CUT), Fault("change", (new, etag))]
    url = server.add("/f.bin", OLD, faults=faults, **options)
    assert get(url, tmp_path, patience) == new
    assert "the file changed on the server" in capfd.readouterr().err


@pytest.mark.parametrize("options", [{}, {"ranges": False}], ids=["ranges", "no ranges"])
def test_an_unchanged_file_of_a_server_that_says_nothing_goes_on(server, tmp_path, patience, capfd, options):
    url = server.add("/f.bin", OLD, etag=None, faults=[Fault("cut", after=CUT)], **options)
    assert get(url, tmp_path, patience) == OLD
    assert ranges(server) == [None, f"bytes={CUT - OVERLAP}-"], "the last bytes are asked for once more"
    assert "changed" not in capfd.readouterr().err


def test_a_beginning_of_unknown_origin_is_not_built_upon(server, tmp_path, patience, capfd):
    (tmp_path / "f.bin.part").write_bytes(b"?" * 100_000)
    url = server.add("/f.bin", OLD)
    assert get(url, tmp_path, patience) == OLD
    said = capfd.readouterr().err
    assert "not known to be from this URL" in said and "changed on the server" not in said


def test_a_complete_part_of_another_version_is_noticed(server, tmp_path, patience):
    """Nothing is missing, the server says 416, and its file is another one of the same size."""
    (tmp_path / "f.bin.part").write_bytes(OLD)
    meta = {"url": server.url + "/f.bin", "etag": '"v1"', "last_modified": None, "total": None}
    (tmp_path / "f.bin.part.json").write_text(json.dumps(meta))
    url = server.add("/f.bin", NEW, etag='"v2"', honours_if_range=False)
    assert get(url, tmp_path, patience) == NEW


# ---------------------------------------------------------------- content, where no hash and no length tell


def zipped():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("a.jpg", encoded())
    return stream.getvalue()


RECORD = {"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>"}]}
RECORDS = json.dumps([RECORD, RECORD]).encode()
LINES = b"\n".join([json.dumps(RECORD).encode()] * 2)
TABLE = pd.DataFrame({"question": ["?"], "answer": ["yes"]}).to_parquet()
ERROR = b'{"error": {"code": 403, "message": "sign in"}}'


def without_length(body):
    return Fault("raw", b"HTTP/1.0 200 OK\r\nContent-Type: application/octet-stream\r\n\r\n" + body)


@pytest.mark.parametrize(
    ("role", "body"), [("images", zipped()), ("annotations", RECORDS), ("annotations", LINES)]
)
def test_whole_files_without_a_length_are_taken(server, tmp_path, patience, role, body):
    url = server.add("/f.bin", b"", faults=[without_length(body)])
    assert get(url, tmp_path, patience, role=role) == body


@pytest.mark.parametrize(
    ("role", "body", "why"),
    [
        ("images", b"", "is empty"),
        ("annotations", b"", "is empty"),
        ("images", zipped()[:-30], "is no whole archive"),
        ("images", ERROR, "is no whole archive"),
        ("annotations", RECORDS[:-20], "is no whole list of records"),
        ("annotations", b"Sorry, come back later", "is no whole list of records"),
        ("annotations", ERROR, "one JSON object that is no record"),
        ("annotations", b"[]", "holds no record"),
        ("annotations", b"<html><body>Sign in</body></html>", "web page"),
    ],
)
def test_what_is_no_file_of_its_kind_is_refused(server, tmp_path, patience, role, body, why):
    url = server.add("/f.bin", b"", faults=[without_length(body)] * 9)
    assert why in refused(url, tmp_path, patience, role=role)


@pytest.mark.parametrize(
    ("name", "body", "why"),
    [
        ("q.parquet", TABLE, ""),
        ("q.parquet", TABLE[:-9], "is no whole parquet file"),
        ("q.parquet", ERROR, "is no whole parquet file"),
        ("q.csv", b"question,answer\n?,yes\n", ""),
        ("q.csv", b"question,answer\n", "holds no record"),
    ],
)
def test_tables_of_questions_are_whole_or_refused(server, tmp_path, patience, name, body, why):
    url = server.add(f"/{name}", b"", faults=[without_length(body)] * 9)
    wanted = Wanted(name, (url,), role="annotations")
    with pytest.raises(UserError, match=why) if why else nullcontext():
        fetch(wanted, tmp_path / name, patience)
    assert (tmp_path / name).exists() == (not why)


# ---------------------------------------------------------------- every wait has an end


def test_wrong_parts_again_and_again_come_to_an_end(server, tmp_path, patience):
    url = server.add("/f.bin", OLD, faults=[Fault("cut", after=CUT)] + [Fault("wrong_range")] * 99)
    said = refused(url, tmp_path, patience, sha256=SHA)
    assert "was asked for the bytes from" in said and "3 attempts" in said
    assert "0.3 MB are kept" in said


def test_a_server_with_wrong_parts_still_gives_the_whole_file(server, tmp_path, patience):
    url = server.add("/f.bin", OLD, faults=[Fault("cut", after=CUT), Fault("wrong_range")])
    assert get(url, tmp_path, patience, sha256=SHA) == OLD
    assert ranges(server) == [None, f"bytes={CUT}-", None]


def test_connections_that_die_after_a_few_bytes_bring_the_file_all_the_same(server, tmp_path, patience):
    data = noise(40_000, seed=3)
    url = server.add("/f.bin", data, faults=[Fault("cut", after=4000) for _ in range(9)])
    assert get(url, tmp_path, patience, sha256=hashlib.sha256(data).hexdigest()) == data
    assert ranges(server)[1:4] == ["bytes=4000-", "bytes=8000-", "bytes=12000-"], "no byte came twice"


def test_a_rate_that_is_too_low_ends_with_the_number(server, tmp_path, patience):
    slow = dataclasses.replace(patience, least_rate=1000, window_s=0.5)
    url = server.add("/f.bin", OLD, faults=[Fault("drip", 0.05)])
    said = refused(url, tmp_path, slow)
    assert "less than 1000 bytes a second" in said
    assert "bytes are kept" in said


def test_headers_that_come_byte_by_byte_come_to_an_end(server, tmp_path, patience):
    short = dataclasses.replace(patience, answer_s=0.3)
    drip = Fault("drip_headers", b"HTTP/1.1 200 OK\r\n" + b"X-Filler: " + b"x" * 1000, after=50)
    url = server.add("/f.bin", OLD, faults=[drip] * 9)
    assert "3 attempts" in refused(url, tmp_path, short)


def test_retry_after_0_is_not_taken_at_its_word(server, tmp_path, patience, capfd):
    url = server.add("/f.bin", OLD, faults=[Fault("status", 503, headers={"Retry_After": "0"})] * 99)
    assert "HTTP 503" in refused(url, tmp_path, patience)
    assert len(server.requests) == patience.attempts
    assert capfd.readouterr().err.count("again in") == patience.attempts - 1
    assert Patience().pause(3, 0.0) >= 2, "our own pauses grow all the same"


def test_a_file_that_changes_all_the_time_comes_to_an_end(server, tmp_path, patience):
    """Each answer brings bytes, and none belongs to the one before."""
    faults = []
    for number in range(50):
        head = f'HTTP/1.1 200 OK\r\nETag: "{number}"\r\nContent-Length: {len(OLD)}\r\n\r\n'
        faults.append(Fault("raw", head.encode() + OLD[:CUT]))
    url = server.add("/f.bin", OLD, faults=faults)
    said = refused(url, tmp_path, dataclasses.replace(patience, restarts=2))
    assert "the file changed on the server (3 times)" in said


def test_silence_is_broken_by_a_line_that_says_what_is_waited_for(server, tmp_path, patience, capfd):
    patience = dataclasses.replace(patience, say_s=0.2, read_s=5)
    url = server.add("/f.bin", OLD, faults=[Fault("hang", 0.8)])
    assert get(url, tmp_path, patience) == OLD
    host = server.url.removeprefix("http://")
    assert capfd.readouterr().err.count(f"f.bin: waiting for an answer of {host}, for ") >= 2


# ---------------------------------------------------------------- answers that every later request would get


@pytest.mark.parametrize(
    ("status", "what_to_do"),
    [(401, "~/.netrc"), (403, "${NAME}"), (404, "check the URL"), (410, "check the URL")],
)
def test_final_answers_say_what_to_do(server, tmp_path, patience, status, what_to_do):
    url = server.add("/f.bin", OLD, faults=[Fault("status", status)])
    said = refused(url, tmp_path, patience)
    assert f"HTTP {status}" in said and what_to_do in said
    assert len(server.requests) == 1, "it is not asked again"


@pytest.mark.parametrize(
    "place",
    ["http://[bad/x?sig=geheim1", "ftp://host/x?sig=geheim1", "http:///x?sig=geheim1",
     "http://a b/?sig=geheim1", "http://127.0.0.1:99999/?sig=geheim1",
     "http://" + "a" * 300 + "/?sig=geheim1"],
)  # fmt: skip
def test_redirects_to_nowhere_are_a_sentence_without_their_signature(
    server, tmp_path, patience, place, capfd
):
    url = server.add("/f.bin", OLD, faults=[Fault("redirect", place)] * 9)
    said = refused(url, tmp_path, patience)
    assert "geheim1" not in said + capfd.readouterr().err


def test_a_refused_connection_behind_a_redirect_keeps_its_signature_to_itself(
    server, tmp_path, patience, capfd
):
    place = "http://127.0.0.1:9/x?X-Amz-Signature=geheim1"
    url = server.add("/f.bin", OLD, faults=[Fault("redirect", place)] * 9)
    said = refused(url, tmp_path, patience)
    assert "connection refused" in said
    assert "geheim1" not in said + capfd.readouterr().err


@pytest.mark.parametrize("lengths", [("400000", "400001"), ("400000, 5", None)])
def test_two_lengths_at_once_are_a_sentence(server, tmp_path, patience, lengths):
    head = "".join(f"Content-Length: {item}\r\n" for item in lengths if item)
    url = server.add("/f.bin", OLD, faults=[Fault("raw", f"HTTP/1.1 200 OK\r\n{head}\r\n".encode() + OLD)])
    assert "two lengths at once" in refused(url, tmp_path, patience)


def test_the_same_length_twice_is_one_length(server, tmp_path, patience):
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(OLD)}\r\nContent-Length: {len(OLD)}\r\n\r\n"
    url = server.add("/f.bin", OLD, faults=[Fault("raw", head.encode() + OLD)])
    assert get(url, tmp_path, patience) == OLD
