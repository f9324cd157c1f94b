"""Fetches the files of a source of kind `hub` or `url`, several at a time, and says what lies where."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow_scripts.acquire.download import fetch
from workflow_scripts.acquire.local_files import describe_local, described_path
from workflow_scripts.acquire.patience import Patience
from workflow_scripts.acquire.settled import Settled
from workflow_scripts.acquire.stopping import Task, gather, until_signalled
from workflow_scripts.acquire.verified import Wanted, provenance_path, recall
from workflow_scripts.acquire.voice import say
from workflow_scripts.archives import detect_type
from workflow_scripts.config.sources import HubSource, PathSource, RemoteFile, UrlSource
from workflow_scripts.disk import check_disk
from workflow_scripts.io import Hiccup, UserError
from workflow_scripts.plan.source_keys import pinned, remember_recipe

if TYPE_CHECKING:
    from workflow_scripts.acquire.hub import Repository

FILES_AT_A_TIME = 4
Fetched = HubSource | UrlSource
Getter = Callable[[Any, Path], tuple[Path, dict[str, Any]]]
GetterMaker = Callable[[Any, Path, Patience], Getter]


def fetch_source(spec: Fetched, folder: Path, getter: GetterMaker) -> dict[str, Any]:
    """Fetches what is not there yet; returns the content of the manifest. A signal ends it at once."""
    return until_signalled(partial(_fetch_all, spec, folder, getter))


def _fetch_all(spec: Fetched, folder: Path, getter: GetterMaker) -> dict[str, Any]:
    # Beside all sources of the working folder, so that parallel jobs share the limit of a host.
    patience = Patience(per_host=spec.connections_per_host, hosts=folder.parent / ".hosts")
    remote = [file for file in spec.files if not spec.replaced(file)]
    own = describe_local(_local_part(spec), folder) if spec.local.images or spec.local.annotations else None
    if not remote and own is not None:
        return own
    remote = _named(spec, remote, folder, patience)
    _take_over_renamed(remote, folder)
    check_disk(folder, sum(missing_bytes(file, folder / file.name) for file in remote), "this source")
    get = getter(spec, folder, patience)
    fetched = _results(gather([partial(get, file, folder / file.name) for file in remote], FILES_AT_A_TIME))
    found = _describe(remote, fetched, folder, own)
    hashes = {file.name: facts["sha256"] for file, (_, facts) in zip(remote, fetched, strict=True)}
    remember_recipe(folder.name, spec, hashes, folder.parent)
    return found


def _named(spec: Fetched, files: list[Any], folder: Path, patience: Patience) -> list[Any]:
    """The files with those that a pattern stands for in its place."""
    if not isinstance(spec, HubSource) or not any(file.is_pattern for file in spec.files):
        return files
    from workflow_scripts.acquire.hub import find_files

    return find_files(_repository(spec, folder, patience), files, folder)


def _repository(spec: HubSource, folder: Path, patience: Patience) -> Repository:
    from workflow_scripts.acquire.hub import Repository

    settled = Settled(folder.name, folder.parent)
    return Repository(spec.repo, spec.repo_type, spec.revision, patience, settled)


def _take_over_renamed(files: list[Any], folder: Path) -> None:
    """A file whose hash is stated may lie here under another name: that of another mirror."""
    names = {file.name for file in files}
    for file in files:
        target = folder / file.name
        if not pinned(file) or target.exists():
            continue
        for memory in sorted(folder.glob(".*.provenance.json")):
            old = folder / memory.name.removeprefix(".").removesuffix(".provenance.json")
            known = recall(old) if old.name not in names else None
            if known is not None and known["sha256"] == file.sha256:
                target.parent.mkdir(parents=True, exist_ok=True)
                old.replace(target)
                memory.replace(provenance_path(target))
                break


def _results(tasks: list[Task[tuple[Path, dict[str, Any]]]]) -> list[tuple[Path, dict[str, Any]]]:
    """All results; when several files fail, all reasons."""
    for task in tasks:
        if task.error is not None and not isinstance(task.error, UserError):
            raise task.error
    if errors := [task.error for task in tasks if task.error is not None]:
        passes = any(isinstance(error, Hiccup) for error in errors)
        raise (Hiccup if passes else UserError)("\n".join(map(str, errors)))
    return [task.result() for task in tasks]


def _local_part(spec: Fetched) -> PathSource:
    """The user's own copies; the config's hashes are verified for archives and files of the same name."""
    hashes: dict[str, str | None] = {
        file.name.rsplit("/", 1)[-1]: file.sha256
        for file in spec.files
        if spec.replaced(file) and file.sha256 and file.trust == "publisher"
    }
    return PathSource(images=spec.local.images, annotations=spec.local.annotations, sha256=hashes)


def missing_bytes(file: RemoteFile, target: Path) -> int:
    """Bytes that are still to come, as far as the config knows the size."""
    if file.bytes is None or recall(target) is not None:
        return 0
    part = target.with_name(target.name + ".part")
    there = part.stat().st_size if part.exists() else 0
    return max(0, file.bytes - there)


def url_getter(spec: UrlSource, folder: Path, patience: Patience) -> Getter:
    """Fetches a file from one of its URLs."""

    def get(file: Any, target: Path) -> tuple[Path, dict[str, Any]]:
        wanted = Wanted(
            file.name,
            file.url,
            file.bytes,
            file.sha256,
            first_use=file.trust == "first_use",
            role=file.role,
        )
        return target, fetch(wanted, target, patience)

    return get


def hub_getter(spec: HubSource, folder: Path, patience: Patience) -> Getter:
    """Fetches a file from a repository."""
    from workflow_scripts.acquire.hub import get_file

    repository = _repository(spec, folder, patience)

    def get(file: Any, target: Path) -> tuple[Path, dict[str, Any]]:
        return get_file(repository, file, target, patience)

    return get


def _describe(
    remote: list[Any], fetched: list[tuple[Path, dict[str, Any]]], folder: Path, own: dict[str, Any] | None
) -> dict[str, Any]:
    found: dict[str, Any] = own or {"images": None, "annotations": [], "files": []}
    for file, (path, provenance) in zip(remote, fetched, strict=True):
        shown = described_path(path, folder)
        if file.sha256 is None and file.role != "other":
            say(
                f"{file.name}: sha256 {provenance['sha256']}, {provenance['bytes']} bytes (not in the config)"
            )
        found["files"].append({**provenance, "path": shown, "trust": file.trust})
        if file.role == "images":
            found["images"] = {"type": detect_type(path), "path": shown}
        elif file.role == "annotations":
            found["annotations"].append({"path": shown, "role": "annotations"})
    return found
