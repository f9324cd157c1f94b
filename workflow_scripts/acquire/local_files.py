"""Files that are already on this machine: what they are, and what recognises their content.

A file of up to 2 GiB is hashed. A larger archive is identified by its size and the hash of its table of
contents, which for a zip has the CRC32 of every member; hashing 27 GB on every look would cost minutes. A
folder is identified by the names, sizes and times of its images.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from llava_ext import files
from workflow_scripts.archives import detect_type, list_members, listing_identity
from workflow_scripts.config.sources import PathSource
from workflow_scripts.io import UserError, canonical_json

HASHED_UP_TO = 2 << 30


def described_path(path: Path, folder: Path) -> str:
    """Relative to the manifest's folder below it, absolute elsewhere."""
    full = path.expanduser().absolute()
    return str(full.relative_to(folder.absolute())) if full.is_relative_to(folder.absolute()) else str(full)


def describe_file(path: Path, shown: str, sha256: str | None = None) -> dict[str, Any]:
    """A file's entry in a source manifest."""
    return {"path": shown, "bytes": path.stat().st_size, "sha256": sha256 or files.sha256(path)}


def describe_folder(path: Path, shown: str, content: bool = False) -> dict[str, Any]:
    """A folder of images; with ``content`` the files are hashed, else names, sizes and times identify it."""
    listing = list_members(path, "folder")
    entry: dict[str, Any] = {
        "path": shown,
        "bytes": int(listing.size.sum()),
        "sha256": None,
        "files": len(listing),
    }
    if content:
        rows = [[name, files.sha256(path / name)] for name in listing.names]
        entry["identity"] = hashlib.sha256(canonical_json(rows).encode()).hexdigest()
    else:
        entry["identity"] = listing_identity(listing, times=True)
    return entry


def describe_archive(path: Path, shown: str, sha256: str | None) -> dict[str, Any]:
    """An archive: hashed when it is small or a hash is to be verified, else known by its table of
    contents.
    """
    if sha256 is not None or path.stat().st_size <= HASHED_UP_TO:
        entry = describe_file(path, shown)
        if sha256 is not None and entry["sha256"] != sha256:
            raise UserError(
                f"{path}: its sha256 is {entry['sha256']}, but {sha256} is expected; the file is damaged or"
                " another version: replace it, or correct the hash in the config"
            )
        return entry
    kind = detect_type(path)
    identity = listing_identity(list_members(path, kind), times=kind == "tar")
    return {"path": shown, "bytes": path.stat().st_size, "sha256": None, "identity": identity}


def describe_local(spec: PathSource, folder: Path) -> dict[str, Any]:
    """The manifest's content for a source of kind `path`."""
    files, images = [], None
    if spec.images is not None:
        path = Path(spec.images).expanduser()
        kind = detect_type(path)
        shown = described_path(path, folder)
        images = {"type": kind, "path": shown}
        files.append(
            describe_folder(path, shown)
            if kind == "folder"
            else describe_archive(path, shown, spec.sha256.get(path.name))
        )
    annotations = []
    for name in spec.annotations:
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"annotations: {path} is no file; check the path in the source's config")
        shown = described_path(path, folder)
        files.append(describe_archive(path, shown, spec.sha256.get(path.name)))
        annotations.append({"path": shown, "role": "annotations"})
    return {"images": images, "annotations": annotations, "files": files}
