"""What this machine has, whatever is computed on it: packages, GPUs, Slurm, the working folder."""

from __future__ import annotations

import fcntl
import importlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from workflow_scripts.launch.preflight import gpus_of_driver, visible_gpus
from workflow_scripts.launch.provenance import ROOT
from workflow_scripts.launch.slurm import output_of
from workflow_scripts.selftest.findings import GB, Finding

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


def check_python() -> Iterator[Finding]:
    """The machine's name, Python, and packages at their pinned versions."""
    yield Finding("machine", True, f"{socket.gethostname()}, {os.cpu_count()} CPUs")
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


def check_hardware(wanted: int = 0) -> Iterator[Finding]:
    """GPUs as the driver and as torch see them, ``wanted`` of them or more; shared memory for data
    workers.
    """
    gpus = visible_gpus()
    found = ", ".join(gpus.names)
    if len(gpus.names) < max(1, wanted):
        why = f": {gpus.why}" if gpus.why else ""
        found = (
            f"torch can use {len(gpus.names)} of {wanted} wanted ({gpus.build}{why}; {gpus_of_driver()})"
            if wanted
            else f"none visible (CPU trainings work; {gpus_of_driver()})"
        )
    yield Finding("GPUs", bool(gpus.names) and len(gpus.names) >= wanted, found, needed=wanted > 0)
    if gpus.names:
        import torch

        yield Finding("bf16", gpus.bf16, "set precision: fp16 where this fails", needed=False)
        yield Finding("NCCL", torch.distributed.is_nccl_available(), "needed for several GPUs")
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free / GB
        yield Finding("/dev/shm", free > 1, f"{free:.1f} GB free; data workers want 1 or more", needed=False)


def check_cluster() -> Iterator[Finding]:
    """Slurm's commands, the plugin, and whether it keeps accounts."""

    tools = [
        name for name in ("sbatch", "srun", "squeue", "scontrol", "scancel") if shutil.which(name) is None
    ]
    yield Finding(
        "Slurm", not tools, f"lacks {', '.join(tools)}" if tools else "its commands are here", needed=False
    )
    if not tools:
        answers = output_of(["squeue", "--noheader", "--me"]) is not None
        yield Finding(
            "Slurm answers", answers, "squeue works" if answers else "squeue fails; SLURM_CONF?", needed=False
        )
        accounts = shutil.which("sacct") and output_of(["sacct", "-X", "-n"]) is not None
        yield Finding(
            "accounting",
            bool(accounts),
            "sacct works" if accounts else "no sacct: squeue is used",
            needed=False,
        )


def check_folder(folder: Path) -> Iterator[Finding]:
    """The working folder: writable, renames, links and locks work, space."""
    free = shutil.disk_usage(folder).free / GB
    yield Finding("disk", free > 5, f"{free:.0f} GB free in {folder}", needed=False)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as trial:
            (Path(trial) / "a").write_text("x")
            (Path(trial) / "a").rename(Path(trial) / "b")
            os.link(Path(trial) / "b", Path(trial) / "c")
            (Path(trial) / "d").symlink_to("b")
            yield _locks(Path(trial) / "lock")
        yield Finding("working folder", True, f"{folder} can be written, with links")
    except OSError as error:
        yield Finding("working folder", False, f"{folder}: {error}")


# Exits with 7 when the file is locked by somebody else.
TRY_LOCK = """
import fcntl, sys
try:
    fcntl.lockf(open(sys.argv[1], "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(7)
"""


def _locks(path: Path) -> Finding:
    """Whether a lock of one process keeps another one out."""
    with path.open("w") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            why = f"fail ({error})"
        else:
            done = subprocess.run(
                [sys.executable, "-c", TRY_LOCK, str(path)], stderr=subprocess.DEVNULL, check=False
            )
            if done.returncode == 7:
                return Finding("file locks", True, "work")
            why = "keep nobody out"
    text = (
        f"{why} in {path.parent.parent}; never start two trainings in one folder by hand, or mount it with"
        " locks"
    )
    return Finding("file locks", False, text, needed=False)


def check_offline() -> Iterator[Finding]:
    """Where the hub's files are looked for."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    switch = os.environ.get("HF_HUB_OFFLINE", "not set")
    text = f"HF_HOME {home}, HF_HUB_OFFLINE {switch}, HF_ENDPOINT {os.environ.get('HF_ENDPOINT', 'not set')}"
    yield Finding("hub", True, text, needed=False)
