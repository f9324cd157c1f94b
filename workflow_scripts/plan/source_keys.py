"""What a source is in keys: where a hash is stated its files are that hash, wherever they come from.

A file without a hash is its URL, or its path in a repository at a commit. What was fetched is remembered
beside the sources, so that a hash that is stated later, and is that of the file that was fetched, changes no
key.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from workflow_scripts.config.base import StrictModel
from workflow_scripts.config.sources import RemoteFile, Source
from workflow_scripts.io import UserError, read_json, write_json
from workflow_scripts.plan.specs import recipe

SOURCES = Path("data/sources")
FORMER: Mapping[str, Mapping[str, Any]] = {
    # COCO train2017, shipped from the beginning: trainings on it are named with these two lines.
    "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929": {
        "name": "train2017.zip",
        "url": [
            "http://images.cocodataset.org/zips/train2017.zip",
            "https://s3.amazonaws.com/images.cocodataset.org/zips/train2017.zip",
        ],
    }
}
"""What stands in a key besides the hash: files that were in keys before URLs were left out of them."""


def pinned(file: RemoteFile) -> bool:
    """True where the stated hash decides; with ``trust: first_use`` another one is only a warning."""
    return file.sha256 is not None and file.trust == "publisher"


def source_recipe(spec: StrictModel) -> dict[str, Any]:
    """What a source says about its content, as it goes into keys. Reads nothing."""
    said = recipe(spec)
    files: tuple[RemoteFile, ...] = getattr(spec, "files", ())
    if not files:
        return said
    if all(map(pinned, files)):
        # One word for all: a file of a hub and its copy on a web server are the same file.
        return {"kind": "url", "files": [_by_hash(file) for file in files]}
    if said["kind"] != "url":
        return said
    entries = zip(files, said["files"], strict=True)
    return {**said, "files": [_by_hash(file) if pinned(file) else entry for file, entry in entries]}


def _by_hash(file: RemoteFile) -> dict[str, Any]:
    return {**FORMER.get(str(file.sha256), {}), "role": file.role, "sha256": file.sha256}


# ---------------------------------------------------------------- what was fetched


def memory_path(name: str, sources: Path = SOURCES) -> Path:
    """Beside the sources' folders: who deletes a download to save space keeps the names of its trainings."""
    return sources / ".known" / f"{name}.json"


def known_recipe(name: str, spec: StrictModel, sources: Path = SOURCES) -> dict[str, Any]:
    """:func:`source_recipe`, or the one under which the same files were fetched before hashes were added."""
    path = memory_path(name, sources)
    if getattr(spec, "files", ()) and path.is_file():
        try:
            known = read_json(path)
            if _same_files(spec, known["files"]):
                return dict(known["recipe"])
        except (UserError, KeyError, TypeError):
            pass
    return source_recipe(spec)


def watched_recipe(name: str, spec: Source, sources: Path = SOURCES) -> dict[str, Any]:
    """:func:`known_recipe`, and what a folder of the user's own pictures is today, by names, sizes and times.

    Files can be inputs of a rule; a folder can't, as its own time says nothing of its files'. Not for keys of
    runs.
    """
    images = spec.own().images
    found = known_recipe(name, spec, sources)
    if images is None or not Path(images).expanduser().is_dir():
        return found
    return {**found, "listing": _folder_identity(Path(images).expanduser())}


@cache
def _folder_identity(path: Path) -> str:
    """Once for each time that Snakemake is started: a million files take seconds."""
    from workflow_scripts.archives import list_members, listing_identity

    return listing_identity(list_members(path, "folder"), times=True)


def remember_recipe(name: str, spec: StrictModel, hashes: Mapping[str, str], sources: Path = SOURCES) -> None:
    """Notes under which recipe these files were fetched; ``hashes`` are their sha256 by name."""
    files: tuple[Any, ...] = getattr(spec, "files", ())
    entries = zip(files, _origins(spec), strict=True)
    content = {
        "recipe": known_recipe(name, spec, sources),
        "files": [{"origin": origin, "sha256": hashes.get(file.name)} for file, origin in entries],
    }
    write_json(memory_path(name, sources), content)


def _origins(spec: StrictModel) -> list[dict[str, Any]]:
    """Of each file: where it comes from and what it is used as, without its hash."""
    said = recipe(spec)
    source = {key: value for key, value in said.items() if key != "files"}
    return [{**source, **{k: v for k, v in entry.items() if k != "sha256"}} for entry in said["files"]]


def _same_files(spec: Any, known: list[dict[str, Any]]) -> bool:
    return len(known) == len(spec.files) and all(map(_same_file, spec.files, _origins(spec), known))


def _same_file(file: RemoteFile, origin: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    if file.sha256 not in (None, known["sha256"]):
        return False
    return origin == known["origin"] or (pinned(file) and file.role == known["origin"]["role"])
