"""One part of a mixture: its records, their images, what the policy makes of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow_scripts.config.mixtures import ImageMapping, MixtureSpec, Part
from workflow_scripts.io import UserError, read_json

if TYPE_CHECKING:
    import numpy as np

    from workflow_scripts.merge.annotations import Records
    from workflow_scripts.merge.joins import Join, Store
    from workflow_scripts.merge.policies import Outcome


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

    records = read_records(files, part.policy.records)
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


def part_report(merged: MergedPart) -> dict[str, Any]:
    """What happened to a part, for the manifest."""
    records, outcome = merged.records, merged.outcome
    lost = [records.found[kind] for kind in ("no_placeholder", "text_placeholder") if kind in records.found]
    findings = {kind: {"action": f.action, "count": f.count} for kind, f in records.found.items()}
    return {
        "annotations": merged.spec.annotations,
        "records": records.total,
        "kept": int(outcome.keep.sum()),
        "used": len(merged.chosen),
        "dropped": dict(sorted(outcome.dropped.items())),
        "kept_damaged": dict(sorted(outcome.kept_damaged.items())),
        "duplicate_ids": _count_duplicates(records),
        "placeholder_mismatches": {
            "count": sum(found.count for found in lost),
            "examples": [example["record"] for found in lost for example in found.examples][:5],
        },
        # only when there is something to say: a manifest that is another text makes what follows run again
        **({"findings": findings} if findings else {}),
        **(
            {"seen_otherwise": dict(sorted(outcome.seen_otherwise.items()))} if outcome.seen_otherwise else {}
        ),
        "examples": outcome.examples,
        "roots": [{"prefix": r.prefix, "source": r.source, "root": r.root} for r in merged.join.resolved],
    }


def _count_duplicates(records: Records) -> int:
    import numpy as np

    ids = records.id_hash[records.id_hash != 0]
    return int(len(ids) - len(np.unique(ids)))
