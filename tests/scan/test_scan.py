"""The scan of whole stores: complete, parallel, resumable, incremental; also as a tool for anybody's
folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.archives.test_archives import MAKERS, make_zip
from tests.support.damage import NO_IMAGES, damaged_jpegs, jpeg, png_header, whole_files
from tests.support.pictures import encoded, seen_otherwise
from workflow_scripts.acquire import step as acquire
from workflow_scripts.io import UserError, read_json
from workflow_scripts.scan import step as scan
from workflow_scripts.scan.table import ScanSettings, read_scan, scan_store

ROOT = Path(__file__).parents[2]


def mixed_members():
    """Whole, damaged and alien files, with the status that each must get."""
    members = [(f"whole/{name}", data, "ok") for name, data in whole_files()]
    sure = ("cut_in_the_middle", "cut_early", "progressive_cut")
    members += [(f"bad/{kind}.jpg", data, "truncated") for kind, data in damaged_jpegs() if kind in sure]
    members += [
        (f"bad/{kind}.jpg", data, "corrupt") for kind, data in damaged_jpegs() if kind in ("hole", "ff_block")
    ]
    members += [(f"alien/{name}", data, "not_an_image") for name, data in NO_IMAGES.items()]
    members += [("bad/empty.jpg", b"", "empty"), ("bad/bomb.png", png_header(50_000, 50_000), "too_large")]
    members += [("lying/gif.jpg", encoded("GIF"), "ok"), ("lying/png.jpg", encoded("PNG"), "ok")]
    data = jpeg(0)
    return [*members, ("odd/padding.jpg", data[:-2] + b"\1\2\3\4" + data[-2:], "suspect")]


def store(folder, kind, members):
    return MAKERS[kind](folder / ("images" if kind == "folder" else f"images.{kind}"), members)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", MAKERS)
def test_every_class_of_defect_is_found_in_every_kind_of_store(tmp_path, kind, threads):
    members = mixed_members()
    path = store(tmp_path, kind, [(name, data) for name, data, _ in members])
    summary = scan_store(path, kind, tmp_path / "images.parquet", ScanSettings(threads))
    rows = {row["name"]: row for row in pq.read_table(tmp_path / "images.parquet").to_pylist()}
    assert {name: rows[name]["status"] for name in rows} == {name: status for name, _, status in members}
    lying = {name for name, row in rows.items() if row["wrong_suffix"]}
    assert lying == {"lying/gif.jpg", "lying/png.jpg"}
    assert summary["wrong_suffix"] == 2
    assert summary["images"] == len(members)
    if kind != "folder":
        raw = path.read_bytes()
        for name, data, _ in members:
            offset = rows[name]["offset"]
            assert raw[offset : offset + len(data)] == data


def test_the_table_does_not_depend_on_threads(tmp_path):
    path = store(tmp_path, "zip", [(name, data) for name, data, _ in mixed_members()])
    digests = {
        scan_store(path, "zip", tmp_path / f"{threads}.parquet", ScanSettings(threads))["table_digest"]
        for threads in (1, 2, 5)
    }
    assert len(digests) == 1


def test_a_flipped_bit_that_no_decoder_sees_is_found_by_the_crc(tmp_path):
    path = store(tmp_path, "zip", [("a.bmp", encoded("BMP")), ("b.jpg", encoded())])
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    summary = scan_store(path, "zip", tmp_path / "t.parquet", ScanSettings())
    assert summary["counts"] == {"ok": 1, "corrupt": 1}
    assert "CRC32" in summary["examples"]["corrupt"][0]["detail"]


def read_count(capsys):
    """How many images the last scan read."""
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("read "))
    return int(line.split()[1])


def test_a_rescan_reads_only_what_changed_in_a_folder(tmp_path, capsys):
    root = store(tmp_path, "folder", [(f"{i}.jpg", encoded(seed=i)) for i in range(20)])
    table = tmp_path / "t.parquet"
    scan_store(root, "folder", table, ScanSettings())
    assert read_count(capsys) == 20
    (root / "3.jpg").write_bytes(encoded(seed=3)[:-60])
    (root / "new.jpg").write_bytes(encoded(seed=99))
    (root / "5.jpg").unlink()
    summary = scan_store(root, "folder", table, ScanSettings())
    assert read_count(capsys) == 2
    assert summary["counts"] == {"ok": 19, "truncated": 1}
    assert (
        summary["table_digest"]
        == scan_store(root, "folder", tmp_path / "u.parquet", ScanSettings())["table_digest"]
    )


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_rescan_of_a_rebuilt_archive_reads_only_what_is_new(tmp_path, capsys, kind):
    """Members keep their results although they lie elsewhere now."""
    members = [(f"{i}.jpg", encoded(seed=i)) for i in range(20)]
    table = tmp_path / "t.parquet"
    scan_store(store(tmp_path, kind, members), kind, table, ScanSettings())
    capsys.readouterr()
    changed = [("first.jpg", jpeg(7)), *members[:10], ("10.jpg", encoded(seed=77)), *members[11:]]
    path = store(tmp_path, kind, changed)
    summary = scan_store(path, kind, table, ScanSettings())
    assert read_count(capsys) == 2
    fresh = scan_store(path, kind, tmp_path / "u.parquet", ScanSettings())
    assert summary == fresh


def test_a_grown_zip_reads_only_the_new_members(tmp_path, capsys):
    path = store(tmp_path, "zip", [(f"{i}.jpg", encoded(seed=i)) for i in range(20)])
    scan_store(path, "zip", tmp_path / "t.parquet", ScanSettings())
    capsys.readouterr()
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("more.jpg", encoded(seed=50))
    scan_store(path, "zip", tmp_path / "t.parquet", ScanSettings())
    assert read_count(capsys) == 1


def test_full_and_other_limits_read_everything_again(tmp_path, capsys):
    path = store(tmp_path, "zip", [(f"{i}.jpg", encoded(seed=i)) for i in range(5)])
    table = tmp_path / "t.parquet"
    for settings, expected in (
        (ScanSettings(), 5),
        (ScanSettings(), 0),
        (ScanSettings(full=True), 5),
        (ScanSettings(max_pixels=100), 5),
    ):
        scan_store(path, "zip", table, settings)
        assert read_count(capsys) == expected


SLOW_SCAN = """
import sys, time
from pathlib import Path
import workflow_scripts.scan.table as scanning
real, scanning.PART_SECONDS = scanning.check, 0.05
def slow(data, max_pixels):
    time.sleep(0.01)
    return real(data, max_pixels)
scanning.check = slow
scanning.scan_store(Path(sys.argv[1]), "zip", Path(sys.argv[2]), scanning.ScanSettings(1))
"""


def test_a_killed_scan_goes_on_where_it_was(tmp_path, capsys):
    path = store(tmp_path, "zip", [(f"{i}.jpg", encoded(seed=i)) for i in range(400)])
    table = tmp_path / "t.parquet"
    process = subprocess.Popen([sys.executable, "-c", SLOW_SCAN, str(path), str(table)], cwd=ROOT)
    parts = tmp_path / ".t.parquet.parts"
    deadline = time.monotonic() + 20
    while len(list(parts.glob("*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not table.exists()
    summary = scan_store(path, "zip", table, ScanSettings())
    assert 0 < read_count(capsys) < 400
    assert summary["counts"] == {"ok": 400}
    assert not parts.exists()


def test_a_half_written_part_is_ignored(tmp_path, capsys):
    path = store(tmp_path, "zip", [(f"{i}.jpg", encoded(seed=i)) for i in range(5)])
    parts = tmp_path / ".t.parquet.parts"
    parts.mkdir()
    (parts / "000000.parquet").write_bytes(b"PAR1 and then the power went")
    scan_store(path, "zip", tmp_path / "t.parquet", ScanSettings())
    assert read_count(capsys) == 5


def make_source(tmp_path, spec, name="N"):
    source = tmp_path / "data" / "sources" / name / "manifest.json"
    acquire.main(["--name", name, "--spec", json.dumps(spec), "--manifest", str(source)])
    return source, tmp_path / "data" / "scans" / name / "manifest.json"


def test_the_workflows_command(tmp_path, capsys):
    path = store(tmp_path, "tar", [(name, data) for name, data, _ in mixed_members()])
    source, manifest = make_source(tmp_path, {"kind": "path", "images": str(path), "expected_images": 7})
    scan.main(["--source", str(source), "--manifest", str(manifest), "--threads", "2"])
    summary = read_json(manifest)
    assert summary["name"] == "N"
    assert summary["warnings"] == [f"{len(mixed_members())} images found, 7 expected"]
    first = manifest.read_bytes()
    os.utime(path)
    scan.main(["--source", str(source), "--manifest", str(manifest)])
    assert manifest.read_bytes() == first, "touching a file changes nothing"
    assert read_scan(manifest, summary).num_rows == summary["images"]


def test_a_source_without_images_has_an_empty_scan(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    source, manifest = make_source(tmp_path, {"kind": "path", "annotations": str(tmp_path / "a.json")})
    scan.main(["--source", str(source), "--manifest", str(manifest)])
    assert read_json(manifest)["images"] == 0


def test_a_table_that_is_not_the_manifests_is_refused(tmp_path):
    path = store(tmp_path, "zip", [("a.jpg", encoded())])
    source, manifest = make_source(tmp_path, {"kind": "path", "images": str(path)})
    scan.main(["--source", str(source), "--manifest", str(manifest)])
    summary = read_json(manifest) | {"table_digest": "0"}
    with pytest.raises(UserError, match="not the table"):
        read_scan(manifest, summary)
    manifest.with_name("images.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="can't be read"):
        read_scan(manifest, summary)


def test_the_tool_for_anybodys_folder(tmp_path, capsys):
    store(tmp_path, "folder", [(name, data) for name, data, _ in mixed_members()])
    scan.main([str(tmp_path / "images")])
    shown = capsys.readouterr().out
    assert "5 truncated" not in shown
    assert "3 truncated" in shown
    assert "bad/empty.jpg" in shown
    assert "an HTML page" in shown
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images"], "nothing is left behind"


def test_the_tool_keeps_a_table_when_asked(tmp_path, capsys):
    path = make_zip(tmp_path / "a.zip", [("a.jpg", encoded())])
    scan.main([str(path), "--table", str(tmp_path / "t.parquet")])
    assert pq.read_table(tmp_path / "t.parquet").num_rows == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "there is no such file"),
        (["--threads", "0", "."], "--threads: 0 is too few"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        scan.main(arguments)
    assert stop.value.code == 1
    assert message in capsys.readouterr().err


def test_a_full_disk_is_explained_and_finished_work_kept(tmp_path):
    """The kernel refuses to write on, as a full disk makes it."""
    import resource

    path = store(tmp_path, "zip", [(f"{i:0100d}.jpg", encoded(seed=i)) for i in range(300)])
    source, manifest = make_source(tmp_path, {"kind": "path", "images": str(path)})

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    command = [
        sys.executable,
        "-m",
        "workflow_scripts.scan",
        "--source",
        str(source),
        "--manifest",
        str(manifest),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert done.returncode == 1
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not manifest.exists()
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_a_broken_download_says_how_to_make_the_source_again(tmp_path, capsys):
    source, manifest = make_source(tmp_path, {"kind": "shapes", "split": "captions", "pictures": 5})
    archive = source.parent / "images.zip"
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(SystemExit):
        scan.main(["--source", str(source), "--manifest", str(manifest)])
    assert f"rm {archive} {source}" in capsys.readouterr().err


def test_pictures_that_training_sees_otherwise_are_counted_with_examples(tmp_path):
    members = {"plain.jpg": (encoded(), "")} | seen_otherwise()
    path = store(tmp_path, "zip", [(name, data) for name, (data, _) in members.items()])
    table = tmp_path / "images.parquet"
    summary = scan_store(path, "zip", table, ScanSettings())
    rows = {row["name"]: row for row in pq.read_table(table).to_pylist()}
    assert {name: row["note"] for name, row in rows.items()} == {n: note for n, (_, note) in members.items()}
    assert summary["counts"] == {"ok": 7}
    assert summary["seen_otherwise"] == {"sixteen_bit": 2, "float": 1, "rotated": 3}
    assert [item["name"] for item in summary["examples"]["float"]] == ["share.tif"]
    assert "otherwise than viewers show them: 2 sixteen_bit, 1 float, 3 rotated" in scan.describe(summary)
    again = scan_store(path, "zip", table, ScanSettings())
    assert again == summary


def test_a_table_of_before_there_were_notes_is_still_read(tmp_path):
    path = store(tmp_path, "zip", [("a.jpg", encoded())])
    table = tmp_path / "images.parquet"
    summary = scan_store(path, "zip", table, ScanSettings())
    pq.write_table(pq.read_table(table).drop_columns(["note"]), table)
    assert read_scan(tmp_path / "manifest.json", summary).num_rows == 1
    assert scan_store(path, "zip", table, ScanSettings()) == summary
