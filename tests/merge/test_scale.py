"""LLaVA-1.5's counts: 1.17 million images in seven archives, 1.22 million records, through scan and merge.

The images are tiny, the counts are real; it takes one or two minutes on two cores. `DATA_SCALE=0.1` runs a
tenth.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.support.synthetic import (
    INSTRUCT,
    PRETRAIN,
    TEXT_ONLY,
    inside,
    scaled,
    tiny_images,
    truncated,
    write_annotations,
    write_archive,
)
from llava_ext.data.samples import open_samples
from workflow_scripts.io import read_json

ROOT = Path(__file__).parents[2]
BAD_EVERY = 5000


@pytest.fixture(scope="module")
def scale():
    return float(os.environ.get("DATA_SCALE", "1"))


@pytest.fixture(scope="module")
def archives(scale):
    return [scaled(archive, scale) for archive in (PRETRAIN, *INSTRUCT)]


@pytest.fixture(scope="module")
def work(tmp_path_factory, archives, scale):
    """The archives and annotations, made into sources."""
    folder = tmp_path_factory.mktemp("scale")
    for archive in archives:
        path = write_archive(archive, folder, BAD_EVERY)
        step(folder, "acquire", archive.source, {"kind": "path", "images": str(path)})
    texts = {"pretrain": ([archives[0]], 0, 1), "instruct": (archives[1:], int(TEXT_ONLY * scale), 2)}
    for name, (used, text_only, turns) in texts.items():
        write_annotations(folder / f"{name}.json", used, text_only, turns, 12)
        step(folder, "acquire", name, {"kind": "path", "annotations": str(folder / f"{name}.json")})
    return folder


def run(folder, module, *arguments):
    """Runs a step as the workflow does; returns its peak memory in MB, its own children included."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", f"workflow_scripts.{module}", *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        assert status == 0, errors.read().decode()
    peak = usage.ru_maxrss / 1000
    print(f"{module} {' '.join(arguments)[:60]}: {time.monotonic() - start:.1f} s, peak {peak:.0f} MB")
    return peak


def step(folder, module, name, spec):
    manifest = f"data/sources/{name}/manifest.json"
    return run(folder, module, "--name", name, "--spec", json.dumps(spec), "--manifest", manifest)


def scan(folder, source):
    arguments = ["--source", f"data/sources/{source}/manifest.json"]
    return run(
        folder, "scan", *arguments, "--manifest", f"data/scans/{source}/manifest.json", "--threads", "2"
    )


@pytest.mark.slow
@pytest.mark.scale
def test_every_image_is_scanned_and_every_damaged_one_found(work, archives):
    for archive in archives:
        scan(work, archive.source)
        found = read_json(work / "data" / "scans" / archive.source / "manifest.json")
        bad = len(range(7, archive.members, BAD_EVERY))
        assert found["images"] == archive.members
        assert found["counts"] == {"ok": archive.members - bad} | ({"truncated": bad} if bad else {})


@pytest.mark.slow
@pytest.mark.scale
@pytest.mark.parametrize("name", ["pretrain", "instruct"])
def test_every_record_is_merged_and_finds_its_image(work, archives, scale, name):
    used = archives[:1] if name == "pretrain" else archives[1:]
    text_only = 0 if name == "pretrain" else int(TEXT_ONLY * scale)
    images = [{"prefix": archive.prefix, "source": archive.source} for archive in used]
    part = {"annotations": name, "images": images, "policy": {"max_dropped_share": 0}}
    expected = sum(archive.records for archive in used) + text_only
    spec = {"parts": [part | {"expected_records": expected}], "expected_records": expected}
    sources = [f"data/sources/{source}/manifest.json" for source in (name, *(a.source for a in used))]
    scans = [f"data/scans/{archive.source}/manifest.json" for archive in used]
    manifest = f"data/mixtures/{name}/manifest.json"
    peak = run(
        work,
        "merge",
        "--name",
        name,
        "--spec",
        json.dumps(spec),
        "--sources",
        *sources,
        "--scans",
        *scans,
        "--manifest",
        manifest,
    )
    assert peak < 1500
    check_samples(open_samples(work / manifest), used, expected, text_only)


def check_samples(store, used, expected, text_only):
    """A few hundred samples from all over: the right image, bit for bit."""
    tiny, numbers = tiny_images(), {}
    for archive in used:
        for number in range(archive.members):
            numbers[inside(archive, number)] = number
    assert len(store) == expected
    assert int((store.lengths < 0).sum()) == text_only
    roots = {archive.prefix: archive.root for archive in used}
    for index in np.linspace(0, expected - 1, 300).astype(int):
        record = store.record(int(index))
        if "image" not in record:
            assert store.image_bytes(int(index)) == []
            continue
        prefix = next(p for p in roots if not p or record["image"].startswith(p + "/"))
        rest = record["image"][len(prefix) :].lstrip("/")
        number = numbers[f"{roots[prefix]}/{rest}".lstrip("/")]
        bad = number % BAD_EVERY == 7
        data = tiny[number % len(tiny)]
        assert store.image_bytes(int(index)) == [truncated(data) if bad else data]
        assert store.tolerant(int(index)) == [bad]


@pytest.mark.slow
@pytest.mark.scale
def test_a_second_scan_reads_nothing(work, archives):
    manifest = work / "data" / "scans" / archives[0].source / "manifest.json"
    before = manifest.read_bytes()
    scan(work, archives[0].source)
    assert manifest.read_bytes() == before


@pytest.mark.slow
@pytest.mark.scale
def test_no_file_an_image(work):
    """The number of files in the working folder does not depend on the number of images."""
    assert sum(path.is_file() for path in (work / "data").rglob("*")) < 60
