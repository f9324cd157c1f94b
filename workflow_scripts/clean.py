"""Lists, and with `--remove` deletes, the runs that no experiment uses.

    snakemake list_unused            snakemake clean_unused
    python -m workflow_scripts.clean --configfile config/config.yaml [more files] [--remove]

Runs that a `experiments/*/checkpoint.json` names (also of another configuration) and runs that are being
computed are kept, unless `--forget` names their experiments. Of a run that is used, states of former inputs
are listed too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from workflow_scripts.command_line import command_line
from workflow_scripts.io import UserError, read_json, user_errors
from workflow_scripts.launch.ownership import OWNER, alive
from workflow_scripts.stages import STAGES


@dataclass(frozen=True)
class Unused:
    """A folder that nothing needs, and why it is one."""

    path: Path
    reason: str
    bytes: int


def folder_bytes(path: Path) -> int:
    """Bytes that deleting the folder frees: files with another hard link elsewhere do not count."""
    total = 0
    for item in path.rglob("*"):
        facts = item.lstat()
        if item.is_file() and not item.is_symlink() and facts.st_nlink == 1:
            total += facts.st_size
    return total


def named_by_experiments(root: Path, forget: Sequence[str]) -> dict[str, str]:
    """The runs that finished experiments name, whatever configuration made them: folder to experiment."""
    found = {}
    for path in sorted(root.glob("experiments/*/checkpoint.json")):
        if path.parent.name not in forget:
            for stage, name in read_json(path).get("runs", {}).items():
                found[f"runs/{stage}/{name}"] = path.parent.name
    return found


def is_computing(folder: Path) -> bool:
    """Whether some process or job owns a state in the folder, or may own it for all that can be asked
    here.
    """
    return any(alive(read_json(path)) is not False for path in folder.glob(f"*/{OWNER}"))


def _measures(folder: Path, kept: set[str]) -> bool:
    """Whether the folder is a finished evaluation of a checkpoint that is kept."""
    manifest = folder / "manifest.json"
    if folder.parent.name != "evaluate" or not manifest.is_file():
        return False
    return f"runs/export/{read_json(manifest).get('checkpoint', {}).get('run')}" in kept


def with_parents(root: Path, kept: set[str]) -> set[str]:
    """``kept``, and the parents of trainings that are kept or being computed, whatever configuration asked
    for them.
    """
    found = set(kept)
    for stage in [stage for stage in reversed(STAGES.values()) if stage.parent]:
        wanted = {
            read_json(path).get("inputs", {}).get("parent")
            for path in root.glob(f"runs/{stage.name}/*/*/spec.json")
            if str(path.parents[1].relative_to(root)) in found or is_computing(path.parents[1])
        }
        found |= {
            str(path.parent.relative_to(root))
            for path in root.glob(f"runs/{stage.parent}/*/manifest.json")
            if read_json(path).get("digest") in wanted
        }
    return found


def find_unused(root: Path, used: Sequence[str], forget: Sequence[str] = ()) -> Iterator[Unused]:
    """The folders below ``root`` that can go."""
    kept = with_parents(root, {*used, *named_by_experiments(root, forget)})
    for folder in sorted(path for path in root.glob("runs/*/*") if path.is_dir()):
        name = str(folder.relative_to(root))
        if is_computing(folder):
            continue
        if name not in kept and not _measures(folder, kept):
            yield Unused(folder, "no experiment uses it", folder_bytes(folder))
        elif (folder / "manifest.json").is_file():
            current = read_json(folder / "manifest.json").get("folder")
            for state in sorted(path for path in folder.iterdir() if path.is_dir() and current):
                if state.name != current:
                    yield Unused(state, "made from inputs that have changed since", folder_bytes(state))


def remove(item: Unused) -> None:
    """Deletes a folder, its manifest first: what is half deleted must not look finished."""
    (item.path / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(item.path)


def clean(root: Path, used: Sequence[str], forget: Sequence[str], really: bool) -> list[Unused]:
    """Lists the unused folders with their sizes and removes them if asked to."""
    found = list(find_unused(root, used, forget))
    for item in found:
        print(f"{item.bytes / 2**20:10.1f} MiB  {item.path.relative_to(root)}  ({item.reason})")
        if really:
            remove(item)
    total = sum(item.bytes for item in found) / 2**20
    what = "removed" if really else "unused; `snakemake clean_unused` removes them"
    print(f"{total:10.1f} MiB in {len(found)} folders {what}" if found else "every run is used")
    return found


def used_by_files(files: Sequence[Path]) -> list[str]:
    """The run folders that configurations use."""
    from workflow_scripts.plan.plan import read_plan

    return sorted({folder for file in files for folder in read_plan([file]).used_folders()})


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Lists or removes."""
    parser = command_line("clean", __doc__)
    parser.add_argument("--used", help="the run folders that are used, as a JSON list")
    parser.add_argument(
        "--configfile", nargs="+", type=Path, default=[], help="configurations whose runs are used"
    )
    parser.add_argument(
        "--forget", nargs="+", default=[], help="experiments of other configurations to give up"
    )
    parser.add_argument("--remove", action="store_true", help="delete what is listed")
    parser.add_argument("--directory", type=Path, default=Path(), help="the working folder")
    options = parser.parse_args(argv)
    if options.used is None and not options.configfile:
        raise UserError("which runs are used? give --configfile FILE (or --used)")
    used = [*(json.loads(options.used) if options.used else []), *used_by_files(options.configfile)]
    clean(options.directory.resolve(), used, options.forget, options.remove)


if __name__ == "__main__":
    main()
