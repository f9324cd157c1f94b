"""Merges annotations and scanned images into one mixture.

    python -m workflow_scripts.merge --name M --spec '<JSON of the mixture>' \\
        --sources data/sources/*/manifest.json --scans data/scans/*/manifest.json \\
        --manifest data/mixtures/M/manifest.json

Beside the manifest it writes `samples.json`, `records.npy` and `images.npy`; docs/data.md describes them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_ext.files import atomic_path
from workflow_scripts.command_line import command_line, read_spec
from workflow_scripts.config.mixtures import MixtureSpec
from workflow_scripts.disk import explain_full_disk
from workflow_scripts.io import UserError, user_errors, write_json
from workflow_scripts.merge.parts import (
    MergedPart,
    annotation_files,
    by_name,
    load_stores,
    merge_part,
    part_report,
)

if TYPE_CHECKING:
    from workflow_scripts.merge.joins import Store
    from workflow_scripts.merge.tables import Tables


def write_mixture(
    name: str, spec: MixtureSpec, parts: list[MergedPart], stores: dict[str, Store], path: Path
) -> dict[str, Any]:
    """Writes the three files and then the manifest, which it returns."""
    from workflow_scripts.merge import writing
    from workflow_scripts.merge.tables import Tables

    total = sum(len(part.chosen) for part in parts)
    if spec.expected_records is not None and total != spec.expected_records:
        raise UserError(
            f"mixture {name}: expected_records is {spec.expected_records}, but {total} records come out"
        )
    if total == 0:
        raise UserError(f"mixture {name}: no record is left; see the policies and sample counts of its parts")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(
        missing_ok=True
    )  # without its manifest a half-replaced mixture can't be taken for a whole one
    tables = Tables(parts, list(stores.values()), total)
    with atomic_path(path.with_name("samples.json")) as temporary, temporary.open("wb") as stream:
        writer = writing.SamplesWriter(stream, total)
        for merged in parts:
            writer.write(merged.records, merged.chosen)
        samples_sha = writer.finish()
    tables.records["offset"], tables.records["length"] = writer.offset, writer.length
    manifest = {
        "name": name,
        "digest": writing.content_digest(samples_sha, tables.images),
        "samples_bytes": writer.position,
        "files": {
            "samples.json": samples_sha,
            "records.npy": writing.write_array(path.with_name("records.npy"), tables.records),
            "images.npy": writing.write_array(path.with_name("images.npy"), tables.images),
        },
        "stores": [{"type": s.type, "path": _relative(s.path, path.parent)} for s in stores.values()],
        **_numbers(tables),
        "parts": [part_report(merged) for merged in parts],
    }
    write_json(path, manifest)
    return manifest


def _numbers(tables: Tables) -> dict[str, Any]:
    return {
        "records": len(tables.records),
        "images": len(tables.images),
        "text_only": int((tables.records["n_images"] == 0).sum()),
        "sources": tables.sources,
        "mappings": tables.mappings,
        "counts": tables.counts(),
    }


def _relative(store: Path, folder: Path) -> str:
    """Relative when both lie in the working folder, so that it can be moved; else absolute."""
    here, store, folder = Path.cwd(), store.absolute(), folder.absolute()
    if store.is_relative_to(here) and folder.is_relative_to(here):
        return os.path.relpath(store, folder)
    return str(store)


def merge(
    name: str, spec: MixtureSpec, sources: Sequence[Path], scans: Sequence[Path], manifest: Path
) -> dict[str, Any]:
    """Makes a mixture; see the module's text. Raises :class:`UserError` for data that the policies refuse."""
    by_source = by_name(sources, "source")
    stores = load_stores(spec, by_source, by_name(scans, "scan"))
    parts = [merge_part(part, annotation_files(part, by_source), stores, spec.seed) for part in spec.parts]
    return write_mixture(name, spec, parts, stores, manifest)


def describe(manifest: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{manifest['name']}: {manifest['records']} records, {manifest['text_only']} of them text only"]
    for part in manifest["parts"]:
        dropped = ", ".join(f"{n} {reason}" for reason, n in part["dropped"].items()) or "none"
        lines.append(
            f"  {part['annotations']}: {part['records']} records, {part['used']} used, dropped: {dropped}"
        )
        for reason, examples in part["examples"].items():
            lines += [
                f"    {reason}: {e['record']}: {e.get('image', '')} ({e['detail']})" for e in examples[:2]
            ]
    return "\n".join(lines)


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Makes one mixture."""
    texts = {"name": "the mixture's name", "spec": "the mixture's section of the config, as JSON"}
    parser = command_line(
        "merge", __doc__, texts, paths={"manifest": "the mixture's manifest, to be written"}
    )
    parser.add_argument("--sources", required=True, nargs="+", type=Path, help="manifests of the sources")
    parser.add_argument("--scans", nargs="*", default=[], type=Path, help="manifests of the scans")
    options = parser.parse_args(argv)
    spec = read_spec(MixtureSpec, options.spec)
    with explain_full_disk(options.manifest.parent, "sources and scans are untouched"):
        result = merge(options.name, spec, options.sources, options.scans, options.manifest)
    print(describe(result), file=sys.stderr)


if __name__ == "__main__":
    main()
