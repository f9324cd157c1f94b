"""What DeepSpeed's offload needs: its Adam for the CPU, compiled safely, and continued exactly.

DeepSpeed compiles that Adam at first use, for the processor it runs on. A build that is killed leaves a lock
on which every later start waits for ever, and what one processor's build gives may crash on another; both are
prevented here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..errors import NoVerdict, say


def offloads_optimizer(deepspeed: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed configuration keeps the optimizer in the CPU's memory or on a disk."""
    section = deepspeed.get("zero_optimization", {}).get("offload_optimizer") or {}
    return section.get("device", "none") != "none"


def extensions_folder() -> Path:
    """Where the compiled code for this Python, torch, DeepSpeed and processor lies; $TORCH_EXTENSIONS_DIR
    if it is set.
    """
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    kind = f"{python}-torch{torch.__version__}-deepspeed{version('deepspeed')}"
    return cache / "llava_ext" / f"{kind}-{platform.machine()}-{_processor()}"


def _processor() -> str:
    """A short name for what the processor can do: the code is compiled for exactly that."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    abilities = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return hashlib.sha256(abilities.encode()).hexdigest()[:8]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Waits until no other process builds in ``folder``; False where the file system has no locks."""
    with (folder / ".building").open("w") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def build_cpu_adam() -> None:
    """Compiles DeepSpeed's CPU Adam unless that is done, one process at a time, and loads it.

    Raises:
        NoVerdict: it can't be compiled here.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder

    folder = extensions_folder()
    built = folder / CPUAdamBuilder.NAME
    built.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    # ninja is installed beside Python, which need not be on the PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with _alone(folder) as alone:
        if alone:  # then whoever left torch's own lock is dead
            (built / "lock").unlink(missing_ok=True)
        if not (built / f"{CPUAdamBuilder.NAME}.so").is_file():
            say(f"compiling DeepSpeed's CPU Adam in {built}; this takes minutes, once", every_rank=True)
        try:
            CPUAdamBuilder().load(verbose=False)
        except (RuntimeError, OSError) as error:
            raise NoVerdict(
                f"offload: DeepSpeed's CPU Adam can't be compiled in {built}: {str(error).strip()[-600:]}\n"
                "It needs a C++ compiler, Python's headers and ninja; install them, or train without offload"
            ) from error
