"""Reading samples: images from the archive against extracted files and zipfile; memory of dataset workers.

    python -m benchmarks.loading [--records 100000] [--repeats 5]

There are at least 2000 records: one for each image.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.support.measure import interleaved, sized_parser, table
from llava_ext.data.samples import open_samples
from tests.support.damage import jpeg
from tests.support.mixing import DataFolder, conversation

IMAGES = 2000


def make(folder: Path, records: int) -> Path:
    """A zip of images of about 50 kB, the same images as files, and a mixture of many records."""
    data = [jpeg(seed, size=(640, 480), quality=80) for seed in range(40)]
    members = {f"{number:06d}.jpg": data[number % 40] for number in range(IMAGES)}
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        made = DataFolder(folder)
        made.images("pics", "zip", members)
        text = "word " * 120
        notes = [conversation(f"{i % IMAGES:06d}.jpg", text, text, id=i) for i in range(records)]
        made.annotations("notes", notes)
        made.mix({"annotations": "notes", "images": [{"source": "pics"}]})
    (folder / "files").mkdir()
    for name, content in members.items():
        (folder / "files" / name).write_bytes(content)
    return made.mixture


def images(folder: Path, mixture: Path, repeats: int) -> str:
    """Microseconds of CPU for an image's bytes, in random order."""
    order = random.Random(0).sample(range(IMAGES), IMAGES)
    store = open_samples(mixture)
    archive = zipfile.ZipFile(folder / "pics.zip")
    ways = {
        "this store, CRC checked": lambda: [store.image_bytes(i) for i in order],
        "extracted files": lambda: [(folder / "files" / f"{i:06d}.jpg").read_bytes() for i in order],
        "an open ZipFile": lambda: [archive.read(f"{i:06d}.jpg") for i in order],
        "a ZipFile opened for each image": lambda: [one_by_one(folder, i) for i in order[:200]],
    }
    costs = interleaved(ways, repeats)
    counts = dict.fromkeys(ways, IMAGES) | {"a ZipFile opened for each image": 200}
    per_image = {name: cost.cpu / counts[name] * 1e6 for name, cost in costs.items()}
    base = per_image["extracted files"]
    rows = [(name, f"{value:.0f}", f"{value / base:.2f}") for name, value in per_image.items()]
    return table(("way", "CPU microseconds an image", "x extracted files"), rows)


def one_by_one(folder: Path, number: int) -> bytes:
    """What a dataset does that keeps no handle."""
    with zipfile.ZipFile(folder / "pics.zip") as archive:
        return archive.read(f"{number:06d}.jpg")


def private_mb() -> float:
    """Memory that belongs to this process alone."""
    with Path("/proc/self/smaps_rollup").open() as stream:
        return sum(int(line.split()[1]) for line in stream if line.startswith("Private_")) / 1000


def worker(read, count: int, pipe) -> None:
    """Reads every sample once, as an epoch does, and reports what it cost."""
    before = private_mb()
    for index in range(count):
        read(index)
    pipe.send(private_mb() - before)


def in_worker(read, count: int) -> float:
    """Private memory that an epoch adds to a forked dataset worker."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=worker, args=(read, count, theirs))
    process.start()
    grown: float = ours.recv()
    process.join()
    return grown


def memory(mixture: Path) -> str:
    """Memory for each dataset worker: a list of dicts is copied page by page as its counters of references
    change.
    """
    store = open_samples(mixture)
    records = json.loads((mixture / "samples.json").read_text())
    listed = in_worker(lambda i: records[i]["conversations"][0]["value"], len(records))
    mapped = in_worker(lambda i: store.record(i)["conversations"][0]["value"], len(store))
    rows = [
        ("this store", f"{mapped:.1f}", "1"),
        ("list of dicts", f"{listed:.1f}", f"{listed / max(mapped, 0.1):.0f}"),
    ]
    return table((f"{len(records)} records", "private MB in each worker", "x this store"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    options = sized_parser(__doc__, argv, records=(100_000, IMAGES), repeats=(5, 1)).parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        mixture = make(Path(name), options.records)
        print(images(Path(name), mixture, options.repeats), memory(mixture), sep="\n\n")
    os.sync()


if __name__ == "__main__":
    main()
