"""Which configurations have used a working folder, and which runs each of them asks for.

Every start writes a record of its own below `runs/.configs/`, so that Snakemakes that start at the same time
do not touch each other's. A record holds the runs themselves: it is good when the configuration's file is
gone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow_scripts.io import digest, read_json, write_json

FOLDER = "runs/.configs"


@dataclass(frozen=True)
class Seen:
    """One content of a configuration, as a start found it.

    Attributes:
        name: its files and what the command line changed; other contents of the same name came before or
        after. runs: the run folders that it asks for, relative to the working folder. time: its last start,
        in seconds since 1970.
    """

    name: str
    runs: frozenset[str]
    time: float


def config_name(root: Path, files: Iterable[str | Path], changed: Mapping[str, Any]) -> str:
    """What a configuration is called: its files, below ``root`` by their relative paths, and what `--config`
    changed.
    """
    paths = [Path(file).absolute() for file in files]
    words = [str(path.relative_to(root) if path.is_relative_to(root) else path) for path in paths]
    return " ".join([*words, *(f"{key}={value}" for key, value in sorted(changed.items()))])


def remember(
    root: Path, files: Iterable[str | Path], changed: Mapping[str, Any], runs: Sequence[str]
) -> None:
    """Records that a configuration has started in ``root`` and asks for ``runs``."""
    name = config_name(root, files, changed)
    path = root / FOLDER / f"{digest(name, 10)}-{digest(sorted(runs), 10)}.json"
    write_json(path, {"config": name, "runs": sorted(runs), "time": time.time()})


def all_seen(root: Path) -> list[Seen]:
    """Every record, oldest first. Raises UserError for one that can't be read: its runs would be unknown."""
    contents = [read_json(path) for path in root.glob(f"{FOLDER}/*.json")]
    found = [Seen(content["config"], frozenset(content["runs"]), content["time"]) for content in contents]
    return sorted(found, key=lambda item: item.time)


def latest(seen: Iterable[Seen]) -> dict[str, Seen]:
    """The last content of each configuration, by name."""
    return {item.name: item for item in seen}
