"""Merges annotations and scanned images into one mixture.

    python -m workflow_scripts.merge --name M --spec '<JSON of the mixture>' \\
        --sources data/sources/*/manifest.json --scans data/scans/*/manifest.json \\
        --manifest data/mixtures/M/manifest.json

Beside the manifest it writes `samples.json`, `records.npy` and `images.npy`; docs/data.md describes them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow_scripts.config.sources import ImageMapping, MixtureSpec, Part
from workflow_scripts.disk import explain_full_disk
from workflow_scripts.io import UserError, atomic_path, read_json, user_errors, write_json

if TYPE_CHECKING:
    import numpy as np

    from workflow_scripts.merge.annotations import Records
    from workflow_scripts.merge.joins import Join, Store
    from workflow_scripts.merge.policies import Outcome
    from workflow_scripts.merge.tables import Tables


@dataclass
class MergedPart:
    """Everything known about one part when its records are about to be written."""

    spec: Part
    records: Records
    join: Join
    outcome: Outcome
    chosen: np.ndarray
    names: list[str]
    """The source's name of each mapping, then that of records without an image."""


def by_name(manifests: Sequence[Path], what: str) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Manifests by the name of their source."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in manifests:
        content = read_json(path)
        if content["name"] in found:
            raise UserError(f"{path}: a second {what} manifest for {content['name']}; give one")
        found[content["name"]] = (path, content)
    return found


def annotation_files(part: Part, sources: dict[str, tuple[Path, dict[str, Any]]]) -> list[Path]:
    """The annotation files of a part, in the order of the source."""
    if part.annotations not in sources:
        raise UserError(f"--sources: the manifest of {part.annotations} is missing")
    path, manifest = sources[part.annotations]
    there = {item["path"]: (path.parent / item["path"]) for item in manifest["annotations"]}
    if not there:
        raise UserError(f"source {part.annotations} has no annotations; name the source that has the JSON")
    if not part.files:
        return list(there.values())
    by_end = {
        wanted: [full for name, full in there.items() if name.endswith(wanted)] for wanted in part.files
    }
    for wanted, matches in by_end.items():
        if len(matches) != 1:
            raise UserError(
                f"files: source {part.annotations} has no annotation file {wanted!r}; it has {list(there)}"
            )
    return [matches[0] for matches in by_end.values()]


def load_stores(
    spec: MixtureSpec,
    sources: dict[str, tuple[Path, dict[str, Any]]],
    scans: dict[str, tuple[Path, dict[str, Any]]],
) -> dict[str, Store]:
    """The scanned images of every source that the mixture uses."""
    from workflow_scripts.archives import store_size
    from workflow_scripts.merge.joins import Store
    from workflow_scripts.scan.table import read_scan

    stores = {}
    for name in spec.source_names()[1]:
        if name not in sources or name not in scans:
            raise UserError(f"--sources, --scans: the manifests of {name} are missing")
        source_path, source = sources[name]
        scan_path, scan = scans[name]
        if source.get("images") is None:
            raise UserError(f"source {name} has no images, but a mapping names it; name another source")
        path = Path(os.path.normpath(source_path.parent / source["images"]["path"]))
        if not path.exists():
            raise UserError(f"{path}: the images of source {name} are gone; make the source again")
        if store_size(path) != scan["store"]["bytes"]:
            raise UserError(f"{path}: the archive changed after its scan; scan it again (delete {scan_path})")
        stores[name] = Store(name, source["images"]["type"], path, read_scan(scan_path, scan))
    return stores


def merge_part(part: Part, files: list[Path], stores: dict[str, Store], seed: int) -> MergedPart:
    """Reads, joins and judges one part, and chooses its records."""
    from workflow_scripts.merge.annotations import read_records
    from workflow_scripts.merge.joins import join_images
    from workflow_scripts.merge.policies import apply_policy

    records = read_records(files)
    join = join_images(records.images, part.images, stores)
    outcome = apply_policy(part, records, join, stores)
    names = [*(mapping.source for mapping in part.images), part.annotations]
    merged = MergedPart(part, records, join, outcome, outcome.keep.nonzero()[0], names)
    merged.chosen = choose_records(merged, seed)
    return merged


def label_of_records(merged: MergedPart) -> np.ndarray:
    """For each record the index of its first image's mapping; ``len(mappings)`` without an image."""
    import numpy as np

    labels = np.full(len(merged.records), len(merged.spec.images), np.int64)
    has = merged.records.n_images > 0
    labels[has] = merged.join.group[merged.records.first_image[has]]
    return labels


def choose_records(merged: MergedPart, seed: int) -> np.ndarray:
    """Applies the sample counts and weights, first of the mappings, then of the part."""
    import numpy as np

    from workflow_scripts.merge.choosing import choose, wanted_count

    part, chosen = merged.spec, merged.chosen
    labels = label_of_records(merged)[chosen]
    groups: list[np.ndarray] = []
    for index, mapping in enumerate((*part.images, None)):
        mine = chosen[labels == index]
        if isinstance(mapping, ImageMapping) and len(mine):
            count = wanted_count(len(mine), mapping.samples, mapping.weight)
            if count != len(mine):
                mine = choose(mine, count, seed, f"{part.annotations}/{mapping.prefix}")
        groups.append(mine)
    chosen = np.sort(np.concatenate(groups))
    count = wanted_count(len(chosen), part.samples, part.weight)
    return chosen if count == len(chosen) else choose(chosen, count, seed, part.annotations)


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


def part_report(merged: MergedPart) -> dict[str, Any]:
    """What happened to a part, for the manifest."""
    records, outcome = merged.records, merged.outcome
    total = len(records) + len(records.malformed)
    return {
        "annotations": merged.spec.annotations,
        "records": total,
        "kept": int(outcome.keep.sum()),
        "used": len(merged.chosen),
        "dropped": dict(sorted(outcome.dropped.items())),
        "kept_damaged": dict(sorted(outcome.kept_damaged.items())),
        "duplicate_ids": _count_duplicates(records),
        "placeholder_mismatches": {
            "count": records.placeholder_mismatches,
            "examples": records.placeholder_mismatch,
        },
        "examples": outcome.examples,
        "roots": [{"prefix": r.prefix, "source": r.source, "root": r.root} for r in merged.join.resolved],
    }


def _count_duplicates(records: Records) -> int:
    import numpy as np

    ids = records.id_hash[records.id_hash != 0]
    return int(len(ids) - len(np.unique(ids)))


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


def main(argv: Sequence[str] | None = None) -> None:
    """Makes one mixture."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_scripts.merge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--name", required=True, help="the mixture's name")
    parser.add_argument("--spec", required=True, help="the mixture's section of the config, as JSON")
    parser.add_argument("--sources", required=True, nargs="+", type=Path, help="manifests of the sources")
    parser.add_argument("--scans", nargs="*", default=[], type=Path, help="manifests of the scans")
    parser.add_argument("--manifest", required=True, type=Path, help="the mixture's manifest, to be written")
    options = parser.parse_args(argv)
    with user_errors():
        try:
            spec = MixtureSpec.model_validate_json(options.spec)
        except ValueError as error:
            raise UserError(f"--spec: {error}") from None
        with explain_full_disk(options.manifest.parent, "sources and scans are untouched"):
            result = merge(options.name, spec, options.sources, options.scans, options.manifest)
        print(describe(result), file=sys.stderr)


if __name__ == "__main__":
    main()
