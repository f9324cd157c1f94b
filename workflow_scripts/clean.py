"""Lists the runs that no configuration uses, and deletes them when it is told to.

    snakemake list_unused            snakemake clean_unused
    python -m workflow_scripts.clean [--configfile FILE [more files]] [--remove [--yes]]

Runs are the folders below `runs/`, and the questions that were written for tasks of lmms-eval
(`data/questions/`). Kept, whatever this configuration says: runs of every other configuration that has used
this folder, runs that an `experiments/*/checkpoint.json` names, runs that are being computed, runs that
nobody knows the configuration of, unfinished ones, those used in the last 14 days, and what these were made
from. The list says which option gives each of them up.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from workflow_scripts.command_line import command_line
from workflow_scripts.config.problems import known, suggestion
from workflow_scripts.configs_seen import Seen, all_seen, latest
from workflow_scripts.io import UserError, read_json, user_errors
from workflow_scripts.launch.ownership import OWNER, alive
from workflow_scripts.plan.plan import read_plan
from workflow_scripts.plan.questions import QUESTIONS
from workflow_scripts.stages import STAGES

# A state's folder is called by a digest of what it is made from.
STATE = re.compile(r"[0-9a-f]{10}")
DAYS = 14.0
DAY_S = 86400.0


@dataclass(frozen=True)
class Wishes:
    """What may go.

    Attributes:
        days: nothing that was used in so many days.
        unfinished: also trainings that have not finished.
        unknown: also runs that no known configuration has asked for.
        forget: experiments whose `checkpoint.json` keeps nothing.
        forget_config: configurations, by name, that keep nothing.
    """

    days: float = DAYS
    unfinished: bool = False
    unknown: bool = False
    forget: Sequence[str] = ()
    forget_config: Sequence[str] = ()


@dataclass(frozen=True)
class Unused:
    """A folder that no configuration uses: why that is so, and, in ``kept``, why it stays all the same."""

    path: Path
    reason: str
    bytes: int
    last_used: float
    kept: str = ""


def measure(path: Path) -> tuple[int, float]:
    """Bytes that deleting the folder frees (files with another hard link elsewhere do not count), and the
    time of the last change in it.
    """
    total, newest = 0, path.stat().st_mtime
    for item in path.rglob("*"):
        with suppress(FileNotFoundError):  # somebody is writing there
            facts = item.lstat()
            newest = max(newest, facts.st_mtime)
            if item.is_file() and not item.is_symlink() and facts.st_nlink == 1:
                total += facts.st_size
    return total, newest


def named_by_experiments(root: Path, forget: Sequence[str]) -> set[str]:
    """The runs that finished experiments name, whatever configuration made them."""
    found = set()
    for path in sorted(root.glob("experiments/*/checkpoint.json")):
        if path.parent.name not in forget:
            found |= {f"runs/{stage}/{name}" for stage, name in read_json(path).get("runs", {}).items()}
    return found


def is_computing(folder: Path) -> bool:
    """Whether some process or job owns a state in the folder (or the folder itself), or may own it for all
    that can be asked here.
    """
    owners = [*folder.glob(OWNER), *folder.glob(f"*/{OWNER}")]
    return any(alive(read_json(path)) is not False for path in owners)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    return dict(read_json(path)) if path.is_file() else {}


def _is_finished_state(state: Path) -> bool:
    path = state / "train_result.json"
    return path.is_file() and read_json(path).get("status") == "finished"


@dataclass
class Folders:
    """The run folders of a working folder, and what each was made from."""

    root: Path
    names: list[str] = field(init=False)
    manifests: dict[str, dict[str, Any]] = field(init=False)
    by_digest: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        places = ("runs/[!.]*/*", f"{QUESTIONS}/[!.]*")
        found = sorted(path for place in places for path in self.root.glob(place) if path.is_dir())
        self.names = [str(path.relative_to(self.root)) for path in found]
        self.manifests = {name: _manifest(self.root / name) for name in self.names}
        self.by_digest = {}
        for name, content in self.manifests.items():
            if Path(name).parent.name in STAGES and "digest" in content:
                self.by_digest.setdefault(content["digest"], []).append(name)

    def needs(self, name: str) -> set[str]:
        """The runs that a run was made from: the parent of a training, the training of an export, the export
        that was asked, its questions, the predictions that were scored.
        """
        content = self.manifests[name]
        found = {f"runs/{stage}/{content[stage]}" for stage in STAGES if stage in content}
        found |= {f"runs/export/{run}" for run in self._named(name, "checkpoint")}
        found |= {f"runs/predict/{run}" for run in self._named(name, "predictions")}
        found |= {f"{QUESTIONS}/{source}" for source in self._named(name, "source", "name")}
        specs = [read_json(path) for path in (self.root / name).glob("*/spec.json")]
        for described in [content, *specs]:
            inputs = described.get("inputs")
            parent = inputs.get("parent") if isinstance(inputs, dict) else None
            found |= set(self.by_digest.get(parent, ())) if parent else set()
        return found & set(self.names) - {name}

    def _named(self, name: str, key: str, what: str = "run") -> list[str]:
        """The run that a run's manifest names under ``key``."""
        said = self.manifests[name].get(key)
        return [said[what]] if isinstance(said, dict) and what in said else []

    def measures(self, name: str, kept: Iterable[str]) -> bool:
        """Whether a run is predictions or scores of a checkpoint that is kept."""
        return any(f"runs/export/{run}" in kept for run in self._named(name, "checkpoint"))


def keep_reason(folder: Path, last_used: float, is_known: bool, wishes: Wishes) -> str:
    """Why a run (or a state of one) that no configuration uses stays; empty when it may go."""
    if is_computing(folder):
        return "it is being computed, or nobody here can say that it is not"
    if not is_known and not wishes.unknown:
        return "no known configuration has asked for it; --unknown gives it up"
    if not wishes.unfinished and not _is_finished(folder):
        return "it is not finished; --unfinished gives it up"
    if time.time() - last_used < wishes.days * DAY_S:
        return f"it was used in the last {wishes.days:g} days; --older-than DAYS says otherwise"
    return ""


def _is_finished(folder: Path) -> bool:
    """Whether a run, or a training's state, is finished; other steps' former results are."""
    if folder.parent.parent.name == "runs" or folder.parent.name == Path(QUESTIONS).name:
        return (folder / "manifest.json").is_file()
    return folder.parent.parent.name not in STAGES or _is_finished_state(folder)


def find_unused(root: Path, used: Iterable[str], wishes: Wishes | None = None) -> Iterator[Unused]:
    """The folders below ``root`` that no configuration uses, those that stay all the same among them.

    ``used``: the run folders of a configuration of now, besides those that are remembered.
    """
    wishes = wishes or Wishes()
    seen = all_seen(root)
    folders = Folders(root)
    current = [item for name, item in latest(seen).items() if name not in wishes.forget_config]
    wanted = {*used, *named_by_experiments(root, wishes.forget)}.union(*(item.runs for item in current))
    wanted = _with_needs(folders, wanted & set(folders.names))
    measuring = {name for name in folders.names if folders.measures(name, wanted)}
    wanted |= _with_needs(folders, measuring)
    unused = [_judge(root, n, seen, wishes) for n in folders.names if n not in wanted]
    unused = _spare_what_is_needed(folders, unused)
    yield from unused
    for name in sorted(wanted):
        yield from _former_states(root / name, folders.manifests[name], wishes)


def _with_needs(folders: Folders, names: set[str]) -> set[str]:
    """Runs, and all that they were made from."""
    found, waiting = set(names), list(names)
    while waiting:
        more = folders.needs(waiting.pop()) - found
        found |= more
        waiting += more
    return found


def _judge(root: Path, name: str, seen: Sequence[Seen], wishes: Wishes) -> Unused:
    mine = [item for item in seen if name in item.runs]
    folder = root / name
    size, changed = measure(folder)
    last_used = max([changed, *(item.time for item in mine)])
    reason = f"{mine[-1].name} does not ask for it any more" if mine else "no configuration names it"
    return Unused(folder, reason, size, last_used, keep_reason(folder, last_used, bool(mine), wishes))


def _spare_what_is_needed(folders: Folders, unused: Sequence[Unused]) -> list[Unused]:
    """What an unused run that stays was made from stays too."""
    names = {str(item.path.relative_to(folders.root)): item for item in unused}
    for name in [name for name, item in names.items() if item.kept]:
        for needed in _with_needs(folders, {name}) & names.keys():
            item = names[needed]
            why = item.kept or f"{name} was made from it"
            names[needed] = Unused(item.path, item.reason, item.bytes, item.last_used, why)
    return list(names.values())


def _former_states(folder: Path, manifest: dict[str, Any], wishes: Wishes) -> Iterator[Unused]:
    """States of former inputs of a run that is used."""
    current = manifest.get("folder")
    for state in sorted(path for path in folder.iterdir() if path.is_dir() and current):
        if state.name != current and STATE.fullmatch(state.name):
            size, changed = measure(state)
            why = keep_reason(state, changed, True, wishes)
            yield Unused(state, "made from inputs that have changed since", size, changed, why)


def remove(item: Unused) -> None:
    """Deletes a folder, its manifest first: what is half deleted must not look finished."""
    (item.path / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(item.path)


def described(root: Path, item: Unused) -> str:
    """An unused folder as a line of the list."""
    used = datetime.fromtimestamp(item.last_used).strftime("%Y-%m-%d")
    kept = f"; kept: {item.kept}" if item.kept else ""
    path = item.path.relative_to(root)
    return f"{item.bytes / 2**20:10.1f} MiB  last used {used}  {path}  ({item.reason}{kept})"


def agreed(question: str, yes: bool) -> bool:
    """Whether the person at the terminal, or the command line, says yes; where neither can, no, and why."""
    if yes:
        return True
    if not sys.stdin.isatty():
        print(
            "nothing is removed: there is no terminal to ask at; to remove them without being asked, run"
            " `python -m workflow_scripts.clean --remove --yes` in this folder"
        )
        return False
    print(f"{question} [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def clean(root: Path, used: Sequence[str], wishes: Wishes, really: bool = False, yes: bool = False) -> None:
    """Lists the unused folders with their sizes and removes those that may go, if it is wanted and agreed."""
    check_names(root, wishes)
    found = list(find_unused(root, used, wishes))
    for item in found:
        print(described(root, item))
    going = {item.path: item for item in found if not item.kept}
    if not going:
        print("every run is used" if not found else "every run is used, or kept for the reason beside it")
        return
    total = sum(item.bytes for item in going.values()) / 2**20
    what = f"{total:.1f} MiB in {len(going)} folders"
    if not really:
        print(f"{what} can go; `snakemake clean_unused` removes them")
    elif agreed(f"delete {what}?", yes):
        # The answer may have taken hours, in which a run has come into use.
        still = [item for item in find_unused(root, used, wishes) if not item.kept and item.path in going]
        for item in still:
            remove(item)
        print(f"{sum(item.bytes for item in still) / 2**20:.1f} MiB in {len(still)} folders removed")
    else:
        print("nothing is removed")


def check_names(root: Path, wishes: Wishes) -> None:
    """Raises UserError for an experiment or a configuration to be forgotten that does not exist."""
    experiments = [path.parent.name for path in sorted(root.glob("experiments/*/checkpoint.json"))]
    for option, names, there in (
        ("--forget", wishes.forget, experiments),
        ("--forget-config", wishes.forget_config, list(latest(all_seen(root)))),
    ):
        for name in names:
            if name not in there:
                advice = suggestion(name, there, "see their names above")
                raise UserError(f"{option}: found {name!r}; there are {known(there) or 'none'}; {advice}")


def used_by_files(configurations: Iterable[Sequence[Path]]) -> list[str]:
    """The run folders that configurations use; of each, later files are merged into earlier ones."""

    return sorted({folder for files in configurations for folder in read_plan(files).used_folders()})


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Lists or removes."""
    parser = command_line("clean", __doc__)
    parser.add_argument("--used", default="[]", help="the run folders that are used, as a JSON list")
    files = "a configuration whose runs are used too; may be given several times"
    parser.add_argument(
        "--configfile", nargs="+", type=Path, action="append", default=[], metavar="FILE", help=files
    )
    parser.add_argument("--older-than", type=float, default=DAYS, metavar="DAYS", help="default: %(default)g")
    parser.add_argument("--unfinished", action="store_true", help="also trainings that have not finished")
    parser.add_argument(
        "--unknown", action="store_true", help="also runs that no known configuration has asked for"
    )
    parser.add_argument("--forget", nargs="+", default=[], help="experiments to give up, by name")
    parser.add_argument(
        "--forget-config", nargs="+", default=[], help="configurations to give up, by the name in the list"
    )
    parser.add_argument("--remove", action="store_true", help="delete what can go, after a question")
    parser.add_argument("--yes", action="store_true", help="with --remove: do not ask")
    parser.add_argument("--directory", type=Path, default=Path(), help="the working folder")
    options = parser.parse_args(argv)
    root = options.directory.resolve()
    used = [*json.loads(options.used), *used_by_files(options.configfile)]
    if not used and not all_seen(root):
        raise UserError(
            "no configuration has been run in this folder; say which runs are used: --configfile FILE"
        )
    wishes = Wishes(
        options.older_than, options.unfinished, options.unknown, options.forget, options.forget_config
    )
    clean(root, used, wishes, options.remove, options.yes)


if __name__ == "__main__":
    main()
