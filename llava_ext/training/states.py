"""Checkpoints that are complete or absent, and the run's identity.

A checkpoint is written to ``.saving-checkpoint-N`` by all ranks, which then share the work of listing every
file with size and CRC-32 and forcing it to the disk; one of them writes ``complete.json`` and renames the
folder to ``checkpoint-N``. A folder without a valid list is never resumed from, and is never counted when old
ones are pruned.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import say
from ..files import crc32, flush, follow_umask, read_json, sha256, write_json

MARKER = "complete.json"
RESULT = "train_result.json"
VERDICT = "verdict"
STAGING = ".saving-"
DAMAGED = "damaged-"


@dataclass(frozen=True)
class Checkpoint:
    """A ``checkpoint-N`` folder."""

    path: Path
    step: int

    def problem(self, contents: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
        """Why it can't be resumed from, or None if every listed file is there, whole, and unchanged.

        ``share``: (2, 8) reads the third of eight shares of the contents, the rest is left to others.
        """
        listing = read_json(self.path / MARKER)
        if not isinstance(listing, dict) or not isinstance(listing.get("files"), dict):
            return f"{MARKER} is missing or damaged, so the save was not finished"
        for place, (name, facts) in enumerate(listing["files"].items()):
            file = self.path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}"
            if contents and place % share[1] == share[0] and crc32(file) != facts["crc32"]:
                return f"{name} has changed since it was saved (its CRC-32 is different)"
        return None

    def set_aside(self, problem: str) -> None:
        """Gives it a name that nothing continues from, and says why."""
        aside = self.path.with_name(DAMAGED + self.path.name)
        say(f"{self.path}: not usable: {problem}; set aside as {aside.name}, looking for an older one")
        shutil.rmtree(aside, ignore_errors=True)
        self.path.rename(aside)

    @property
    def facts(self) -> dict[str, Any]:
        """What was recorded with it: step, world size, engine."""
        return read_json(self.path / MARKER) or {}


def checkpoints(output_dir: Path) -> list[Checkpoint]:
    """All ``checkpoint-N`` folders, newest step first, complete or not."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found.append(Checkpoint(path, int(match.group(1))))
    return sorted(found, key=lambda item: -item.step)


def last_good(
    output_dir: Path,
    share: tuple[int, int] = (0, 1),
    on_first: Callable[[Callable[[], Any]], Any] = lambda work: work(),
    from_all: Callable[[Any], list[Any]] = lambda value: [value],
) -> Checkpoint | None:
    """The newest checkpoint that is whole. Damaged newer ones are set aside under ``damaged-checkpoint-N``.

    Several ranks share the reading: every rank calls, with its ``share``, with ``on_first``, which does
    something on the first rank and gives the result to all, and with ``from_all``, which gives the values of
    all ranks to all.
    """
    while checkpoint := on_first(lambda: next(iter(checkpoints(output_dir)), None)):
        problem = next(filter(None, from_all(checkpoint.problem(share=share))), None)
        if problem is None:
            return checkpoint
        on_first(partial(checkpoint.set_aside, problem))
    return None


def staging(output_dir: Path, step: int) -> Path:
    """The folder that becomes ``checkpoint-<step>``."""
    return output_dir / f"{STAGING}checkpoint-{step}"


def clear_staging(output_dir: Path) -> None:
    """Removes what killed saves left behind."""
    for path in output_dir.glob(f"{STAGING}*"):
        shutil.rmtree(path, ignore_errors=True)


def listing(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and CRC-32 of files in ``folder``, each forced to the disk."""
    found = {}
    for name in names:
        path = folder / name
        found[name] = {"bytes": path.stat().st_size, "crc32": crc32(path)}
        flush(path)
    return found


def file_names(folder: Path) -> list[str]:
    """All files below ``folder``, largest first."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    files.sort(key=lambda path: (-path.stat().st_size, str(path)))
    return [str(path.relative_to(folder)) for path in files]


def shares(seen: Sequence[Sequence[str]]) -> list[list[str]]:
    """Deals files to the ranks that see them; ``seen``: each rank's names, largest first. Every file is in
    one share.
    """
    dealt: list[list[str]] = [[] for _ in seen]
    for name in dict.fromkeys(name for names in seen for name in names):
        able = [rank for rank, names in enumerate(seen) if name in names]
        dealt[min(able, key=lambda rank: len(dealt[rank]))].append(name)
    return dealt


def seal(
    folder: Path, target: Path, step: int, files: dict[str, dict[str, Any]] | None = None, **facts: Any
) -> None:
    """Lists what ``folder`` holds (``files``, where it has been listed already), then gives it its final
    name.
    """
    files = listing(folder, file_names(folder)) if files is None else files
    follow_umask(folder)
    write_json(folder / MARKER, {"step": step, "files": files, **facts})
    flush(folder)
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)
    flush(target.parent)


def prune(output_dir: Path, keep: int | None) -> None:
    """Removes old checkpoints beyond the ``keep`` newest complete ones (None or 0: keeps all)."""
    if not keep:
        return
    complete = [item for item in checkpoints(output_dir) if item.problem(contents=False) is None]
    for old in complete[keep:]:
        # First out of sight, so that a kill in the middle leaves nothing that looks like a checkpoint.
        doomed = old.path.with_name(f"{STAGING}old-{old.path.name}")
        old.path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    if complete:
        for path in output_dir.glob(f"{DAMAGED}checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)


def finished(output_dir: Path) -> dict[str, Any] | None:
    """The result of a training that has ended here, if its files are still whole in size."""
    result = read_json(output_dir / RESULT)
    if not isinstance(result, dict) or result.get("status") != "finished":
        return None
    for name, facts in result.get("bytes", {}).items():
        path = output_dir / name
        if not path.is_file() or path.stat().st_size != facts:
            say(
                f"{path}: missing or changed since the training finished; it is made again from the last"
                " checkpoint"
            )
            return None
    return result


def publish(folder: Path, output_dir: Path) -> tuple[dict[str, str], dict[str, int]]:
    """Moves the verified final files from ``folder`` into ``output_dir``; returns their sha256 and sizes."""
    digests, sizes = {}, {}
    follow_umask(folder)
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        name = str(path.relative_to(folder))
        flush(path)
        digests[name], sizes[name] = sha256(path), path.stat().st_size
        target = output_dir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    shutil.rmtree(folder, ignore_errors=True)
    flush(output_dir)
    return digests, sizes


def write_result(output_dir: Path, status: str, step: int, **facts: Any) -> None:
    """Writes ``train_result.json``, the last file of a training."""
    write_json(output_dir / RESULT, {"status": status, "step": step, "time": time.time(), **facts})
