"""The merge against the standard library's json: CPU time and memory.

    python -m benchmarks.merge [--scale 0.1] [--repeats 3]

A scale of 1 is LLaVA-1.5's size. The rival is what people write: load both files, drop the records whose
image is missing, dump. It makes no index, counts no words and computes no hash; the merge does.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.support.measure import Cost, child, interleaved, sized_parser, table
from benchmarks.support.synthetic import (
    INSTRUCT,
    PRETRAIN,
    TEXT_ONLY,
    scaled,
    write_annotations,
    write_archive,
)

STDLIB = """
import json, sys, zipfile, tarfile
out, *pairs = sys.argv[1:]
records = []
for pair in pairs:
    name, *archives = pair.split(":")
    members = set()
    for archive in archives:
        path, prefix, root = archive.split("=")
        if path.endswith(".zip"):
            names = zipfile.ZipFile(path).namelist()
        else:
            names = tarfile.open(path).getnames()
        members |= {f"{prefix}/{n[len(root):].lstrip('/')}".lstrip("/") for n in names}
    with open(name) as stream:
        records += [r for r in json.load(stream) if "image" not in r or r["image"] in members]
with open(out, "w") as stream:
    stream.write(json.dumps(records))
"""


def run(*arguments: str) -> Cost:
    """A module of the workflow in its own process."""
    return child([sys.executable, "-m", *arguments])


def prepare(folder: Path, scale: float) -> tuple[list[str], list[str], list[str]]:
    """Archives, annotations, sources, scans; returns the rival's arguments and the merge's."""
    groups = {
        "pretrain": [scaled(PRETRAIN, scale)],
        "instruct": [scaled(archive, scale) for archive in INSTRUCT],
    }
    rival, parts, names = [], [], []
    for name, archives in groups.items():
        text_only = int(TEXT_ONLY * scale) if name == "instruct" else 0
        # the sizes of LLaVA's own files: 181 MB and 1.03 GB
        turns, words = (1, 18) if name == "pretrain" else (4, 42)
        write_annotations(folder / f"{name}.json", archives, text_only, turns, words)
        acquire(folder, name, {"annotations": str(folder / f"{name}.json")})
        rival.append(f"{folder / name}.json:" + ":".join(arguments_of(folder, archives)))
        images = [{"prefix": archive.prefix, "source": archive.source} for archive in archives]
        parts.append({"annotations": name, "images": images})
        names += [name, *(archive.source for archive in archives)]
    scans = [f"{folder}/data/scans/{name}/manifest.json" for name in names if name not in groups]
    for name in names:
        if name not in groups:
            source = f"{folder}/data/sources/{name}/manifest.json"
            run(
                "workflow_scripts.scan",
                "--source",
                source,
                "--manifest",
                f"{folder}/data/scans/{name}/manifest.json",
            )
    spec = json.dumps({"parts": parts})
    sources = [f"{folder}/data/sources/{name}/manifest.json" for name in names]
    ours = ["--name", "M", "--spec", spec, "--sources", *sources, "--scans", *scans]
    return rival, [*ours, "--manifest", f"{folder}/data/mixtures/M/manifest.json"], names


def arguments_of(folder: Path, archives) -> list[str]:
    """Writes the archives and makes their sources."""
    found = []
    for archive in archives:
        path = write_archive(archive, folder)
        acquire(folder, archive.source, {"images": str(path)})
        found.append(f"{path}={archive.prefix}={archive.root}")
    return found


def acquire(folder: Path, name: str, spec: dict[str, str]) -> None:
    """Makes a source of kind path."""
    manifest = f"{folder}/data/sources/{name}/manifest.json"
    text = json.dumps({"kind": "path"} | spec)
    run("workflow_scripts.acquire", "--name", name, "--spec", text, "--manifest", manifest)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    options = sized_parser(__doc__, argv, scale=(0.1, 0.0005), repeats=(3, 1)).parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rival, ours, _ = prepare(folder, options.scale)
        ways = {
            "this merge": lambda: run("workflow_scripts.merge", *ours),
            "json.load, filter, json.dumps": lambda: child(
                [sys.executable, "-c", STDLIB, str(folder / "out.json"), *rival]
            ),
        }
        costs = interleaved(ways, options.repeats)
        sizes = sum((folder / f"{part}.json").stat().st_size for part in ("pretrain", "instruct"))
    base = costs["json.load, filter, json.dumps"]
    rows = [
        (
            name,
            f"{c.cpu:.1f}",
            f"{base.cpu / c.cpu:.1f}",
            f"{c.wall:.1f}",
            f"{c.peak_mb:.0f}",
            f"{base.peak_mb / c.peak_mb:.1f}",
        )
        for name, c in costs.items()
    ]
    print(f"{sizes / 1e6:.0f} MB of annotations\n")
    print(table(("way", "CPU s", "x faster", "clock s", "peak MB", "x less memory"), rows))


if __name__ == "__main__":
    main()
