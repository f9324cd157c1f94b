"""Says what this machine has and lacks for the workflow: `python -m workflow_scripts.selftest [--configfile FILE]`.

Run it on the login node, and through `srun` on a compute node. The exit status is 1 when something needed is missing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from workflow_scripts.io import UserError, user_errors
from workflow_scripts.launching.preflight import gpu_names
from workflow_scripts.launching.provenance import ROOT

IMPORTS = (
    "torch",
    "transformers",
    "accelerate",
    "PIL",
    "pyarrow",
    "msgspec",
    "simplejpeg",
    "safetensors",
    "pydantic",
    "snakemake",
)


@dataclass(frozen=True)
class Finding:
    """One line of the report; a missing need is a failure, a missing extra is not."""

    what: str
    good: bool
    text: str
    needed: bool = True


def check_python() -> Iterator[Finding]:
    """Python and packages at their pinned versions."""
    found = ".".join(str(part) for part in sys.version_info[:3])
    yield Finding(
        "python", sys.version_info >= (3, 11), f"{found} at {sys.executable}; 3.11 or newer is needed"
    )
    for name in IMPORTS:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - whatever stops an import is the finding
            yield Finding(name, False, f"can't be imported: {error}; run `make env`")
    for line in (ROOT / "envs/requirements.txt").read_text().splitlines():
        name, equals, wanted = line.split("#")[0].split(";")[0].strip().partition("==")
        if equals:
            yield from _pinned(name.split("[")[0].strip(), wanted.split()[0])


def _pinned(name: str, wanted: str) -> Iterator[Finding]:
    try:
        here = version(name)
    except PackageNotFoundError:
        yield Finding(name, False, f"is not installed, {wanted} is pinned; run `make env`", needed=False)
        return
    if here.split("+")[0] != wanted.split("+")[0]:
        yield Finding(name, False, f"is {here}, {wanted} is pinned; run `make env`", needed=False)


def check_hardware() -> Iterator[Finding]:
    """GPUs as the driver and as torch see them, shared memory for data workers."""
    names = gpu_names()
    yield Finding("GPUs", bool(names), ", ".join(names) or "none visible (CPU trainings work)", needed=False)
    import torch

    if names:
        count = torch.cuda.device_count()
        yield Finding(
            "torch sees",
            count == len(names),
            f"{count} of {len(names)} GPUs; is it a CUDA build ({torch.__version__})?",
        )
        yield Finding(
            "bf16", torch.cuda.is_bf16_supported(), "set precision: fp16 where this fails", needed=False
        )
        yield Finding("NCCL", torch.distributed.is_nccl_available(), "needed for several GPUs")
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free / 2**30
        yield Finding("/dev/shm", free > 1, f"{free:.1f} GiB free; data workers want 1 or more", needed=False)


def check_cluster() -> Iterator[Finding]:
    """Slurm's commands, the plugin, and whether it keeps accounts."""
    from workflow_scripts.launching.slurm import _output

    tools = [
        name for name in ("sbatch", "srun", "squeue", "scontrol", "scancel") if shutil.which(name) is None
    ]
    yield Finding(
        "Slurm", not tools, f"lacks {', '.join(tools)}" if tools else "its commands are here", needed=False
    )
    if not tools:
        answers = _output(["squeue", "--noheader", "--me"]) is not None
        yield Finding(
            "Slurm answers", answers, "squeue works" if answers else "squeue fails; SLURM_CONF?", needed=False
        )
        accounts = shutil.which("sacct") and _output(["sacct", "-X", "-n"]) is not None
        yield Finding(
            "accounting",
            bool(accounts),
            "sacct works" if accounts else "no sacct: squeue is used",
            needed=False,
        )


def check_folder(folder: Path) -> Iterator[Finding]:
    """The working folder: writable, renames and links work, space."""
    free = shutil.disk_usage(folder).free / 2**30
    yield Finding("disk", free > 5, f"{free:.0f} GiB free in {folder}", needed=False)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as trial:
            (Path(trial) / "a").write_text("x")
            (Path(trial) / "a").rename(Path(trial) / "b")
            os.link(Path(trial) / "b", Path(trial) / "c")
            (Path(trial) / "d").symlink_to("b")
        yield Finding("working folder", True, f"{folder} can be written, with links")
    except OSError as error:
        yield Finding("working folder", False, f"{folder}: {error}")


def check_offline() -> Iterator[Finding]:
    """Where the hub's files are looked for."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    switch = os.environ.get("HF_HUB_OFFLINE", "not set")
    text = f"HF_HOME {home}, HF_HUB_OFFLINE {switch}, HF_ENDPOINT {os.environ.get('HF_ENDPOINT', 'not set')}"
    yield Finding("hub", True, text, needed=False)


def check_config(path: Path) -> Iterator[Finding]:
    """The configuration is valid."""
    from workflow_scripts.config.load import load_file

    try:
        loaded = load_file(path)
    except UserError as error:
        yield Finding("configuration", False, str(error))
    else:
        yield Finding("configuration", True, f"{path}: {len(loaded.names)} experiments")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints all findings; exit status 1 when something needed is missing."""
    parser = argparse.ArgumentParser(prog="python -m workflow_scripts.selftest", description=__doc__)
    parser.add_argument("--configfile", type=Path, help="also check this configuration")
    parser.add_argument("--directory", type=Path, default=Path(), help="the working folder")
    options = parser.parse_args(argv)
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_python,
        check_hardware,
        check_cluster,
        check_offline,
    ]
    checks.append(lambda: check_folder(options.directory.resolve()))
    if options.configfile:
        checks.append(lambda: check_config(options.configfile))
    failures = 0
    with user_errors():
        for check in checks:
            for item in check():
                mark = "ok  " if item.good else "FAIL" if item.needed else "note"
                failures += not item.good and item.needed
                print(f"{mark} {item.what}: {item.text}", flush=True)
    print("everything that is needed is here" if not failures else f"{failures} things are missing")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
