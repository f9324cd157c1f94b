"""The scan against the folk methods: speed, damage found, false alarms.

    python -m benchmarks.scan [--images 200] [--repeats 5] [--seeds 50]

``--seeds`` is the number of pictures for the table of damage. Pictures are drawn with detail everywhere, so
that their JPEGs are as large and as dense as photos of that size.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageFile

from benchmarks.support.measure import interleaved, sized_parser, table
from tests.support.damage import damaged_jpegs, damaged_others, jpeg, whole_files
from workflow_scripts.scan.image_check import check, prepare_process
from workflow_scripts.scan.table import ScanSettings, scan_store


def pillow_load(data: bytes) -> bool:
    """True when a full decode is content."""
    try:
        Image.open(io.BytesIO(data)).load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def pillow_verify(data: bytes) -> bool:
    """True when verify() is content; for JPEGs it looks at the header."""
    try:
        Image.open(io.BytesIO(data)).verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def pillow_tolerant(data: bytes) -> bool:
    """What LOAD_TRUNCATED_IMAGES, the usual advice, notices."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        return pillow_load(data)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def end_marker(data: bytes) -> bool:
    """Another folk method, for JPEGs: the last two bytes."""
    return data.endswith(b"\xff\xd9") or not data.startswith(b"\xff\xd8")


WAYS = {
    "this scan": lambda data: check(data).status == "ok",
    "Pillow open().load()": pillow_load,
    "Pillow open().verify()": pillow_verify,
    "Pillow load, LOAD_TRUNCATED_IMAGES": pillow_tolerant,
    "last two bytes": end_marker,
}


def libjpeg_complains(data: bytes) -> bool:
    """The reference for damage: errors and warnings of libjpeg's full decode."""
    import simplejpeg

    try:
        simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return True
    return False


def quality(seeds: int) -> str:
    """Which damage each way finds, and what it wrongly calls damaged."""
    broken = [d for seed in range(seeds) for _, d in damaged_jpegs(seed) if libjpeg_complains(d)]
    broken += [data for seed in range(seeds) for _, data in damaged_others(seed)]
    whole = [data for seed in range(seeds) for _, data in whole_files(seed)]
    rows = []
    for name, way in WAYS.items():
        missed, alarms = sum(map(way, broken)), sum(not way(data) for data in whole)
        rows.append((name, f"{missed} of {len(broken)}", f"{alarms} of {len(whole)}"))
    return table(("way", "damage missed", "false alarms"), rows)


def speed(images: int, repeats: int) -> str:
    """Images a second of one core, and of the whole scan of a zip."""
    files = [jpeg(seed, size=(640, 480), quality=90) for seed in range(images)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for number, data in enumerate(files):
                archive.writestr(f"{number}.jpg", data)

        def loop(way):
            return lambda: [way(data) for data in files]

        def whole_scan(threads):
            table_path = Path(folder) / "t.parquet"
            return lambda: scan_store(path, "zip", table_path, ScanSettings(threads, full=True))

        ways = {name: loop(way) for name, way in list(WAYS.items())[:3]}
        ways |= {"scan of a zip, 1 thread": whole_scan(1), "scan of a zip, 2 threads": whole_scan(2)}
        costs = interleaved(ways, repeats)
    base = costs["Pillow open().load()"]
    rows = [
        (
            name,
            f"{images / c.cpu:.0f}",
            f"{base.cpu / c.cpu:.2f}",
            f"{images / c.wall:.0f}",
            f"{base.wall / c.wall:.2f}",
        )
        for name, c in costs.items()
    ]
    size = sum(map(len, files)) / len(files) / 1000
    head = ("way", "images per CPU s", "x load", "images per s", "x load, clock")
    return f"{images} JPEGs of 640 x 480, {size:.0f} kB each\n\n" + table(head, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    parser = sized_parser(__doc__, argv, images=(200, 4), repeats=(5, 1), seeds=(50, 1))
    options = parser.parse_args(argv)
    prepare_process()
    print(quality(options.seeds), speed(options.images, options.repeats), sep="\n\n")


if __name__ == "__main__":
    main()
