"""Looks at every image of a source, straight from its archive, and writes one table row each.

    python -m workflow_scripts.scan --source data/sources/N/manifest.json --manifest
    data/scans/N/manifest.json python -m workflow_scripts.scan FOLDER_OR_ARCHIVE [--table images.parquet]

Finished work is kept while the scan runs, so a killed scan goes on where it was; a later scan of a changed
store reads only what is new or changed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from workflow_scripts.archives import detect_type
from workflow_scripts.command_line import command_line
from workflow_scripts.disk import explain_full_disk
from workflow_scripts.io import UserError, read_json, user_errors, write_json

TABLE = "images.parquet"


def store_path(manifest: Path, path: str) -> Path:
    """A path in a manifest is relative to the manifest's folder, or absolute."""
    return (manifest.parent / path).resolve()


def scan_source(source: Path, manifest: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Scans the images that a source manifest names and writes the scan's table and manifest."""
    from workflow_scripts.scan.table import ScanSettings, scan_store

    described = read_json(source)
    table = manifest.parent / TABLE
    if described.get("images") is None:
        summary: dict[str, Any] = {"images": 0, "counts": {}, "store": None}
    else:
        store = store_path(source, described["images"]["path"])
        settings = ScanSettings(options.threads, options.max_pixels, options.full)
        try:
            summary = scan_store(store, described["images"]["type"], table, settings)
        except UserError as error:
            again = "" if described["kind"] == "path" else f". To make the source again: rm {store} {source}"
            raise UserError(f"{error}{again}") from None
        _compare_count(summary, described.get("expected_images"))
    summary = {"name": described["name"], **summary}
    write_json(manifest, summary)
    return summary


def _compare_count(summary: dict[str, Any], expected: int | None) -> None:
    if expected is not None and summary["images"] != expected:
        summary["warnings"] = [f"{summary['images']} images found, {expected} expected"]
        print(f"warning: {summary['warnings'][0]}", file=sys.stderr, flush=True)


def scan_path(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Scans anybody's folder or archive; the table stays only when a name is given for it."""

    from workflow_scripts.scan.table import ScanSettings, scan_store

    settings = ScanSettings(options.threads, options.max_pixels, options.full)
    if options.table:
        return scan_store(path, detect_type(path), options.table, settings)
    with TemporaryDirectory(prefix="scan-") as folder:
        return scan_store(path, detect_type(path), Path(folder) / TABLE, settings)


def describe(summary: dict[str, Any]) -> str:
    """The result for people: counts, then examples of what is wrong."""
    counts = ", ".join(f"{n} {status}" for status, n in summary["counts"].items()) or "no images"
    lines = [f"{summary['images']} images: {counts}; {summary.get('wrong_suffix', 0)} with a wrong suffix"]
    if noted := ", ".join(f"{n} {note}" for note, n in summary.get("seen_otherwise", {}).items()):
        lines.append(f"  training sees otherwise than viewers show them: {noted}")
    for status, examples in summary.get("examples", {}).items():
        lines += [f"  {status}: {item['name']}  ({item['detail']})" for item in examples]
    for kind, note in summary.get("notes", {}).items():
        lines.append(f"  left out or unusual, {kind}: {note['count']}, e.g. {note['examples'][0]}")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_line("scan", __doc__)
    parser.add_argument("path", nargs="?", type=Path, help="a folder, a zip or a tar")
    parser.add_argument("--table", type=Path, help="with PATH: keep the table (parquet) under this name")
    parser.add_argument("--source", type=Path, help="the manifest of a source")
    parser.add_argument("--manifest", type=Path, help="with --source: the scan's manifest, to be written")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s"
    )
    parser.add_argument("--max-pixels", type=int, default=178_956_970, help="more is too_large (%(default)s)")
    parser.add_argument("--full", action="store_true", help="read everything again, also what did not change")
    options = parser.parse_args(argv)
    if (options.path is None) == (options.source is None):
        parser.error("give either a folder or archive, or --source and --manifest")
    if options.source is not None and options.manifest is None:
        parser.error("--source needs --manifest")
    return options


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Scans one source for the workflow, or any folder or archive for people."""
    options = parse(argv)
    if options.threads < 1:
        raise UserError(f"--threads: {options.threads} is too few; use 1 or more")
    if options.path is not None:
        print(describe(scan_path(options.path, options)))
        return
    with explain_full_disk(options.manifest.parent, "what was scanned is kept"):
        summary = scan_source(options.source, options.manifest, options)
    print(describe(summary), file=sys.stderr)


if __name__ == "__main__":
    main()
