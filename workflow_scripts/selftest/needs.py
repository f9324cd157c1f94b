"""What a configuration needs of a machine: trackers, FlashAttention, a compiler, shared memory, space,
fetched files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from workflow_scripts.config.compute import ComputeSpec
from workflow_scripts.launch.preflight import importable
from workflow_scripts.plan.needs import disk_needs, items_of, missing_trackers
from workflow_scripts.plan.plan import Plan
from workflow_scripts.selftest.findings import GB, Finding

# A picture in 8 bits at CLIP-L's 336 pixels; every worker keeps two batches ready.
PICTURE = 3 * 336 * 336
READY_BATCHES = 2


def check_needs(plan: Plan, folder: Path) -> Iterator[Finding]:
    """Everything that the configuration's trainings need here, in the working folder ``folder``."""
    kinds = plan.used_compute()
    yield from (Finding("tracker", False, text) for text in missing_trackers(plan))
    yield from check_flash_attention(kinds)
    yield from check_compiler(kinds)
    yield from check_shared_memory(kinds)
    with contextlib.chdir(folder):
        yield from check_space(plan)
        yield from check_fetched(plan)


def check_flash_attention(kinds: Mapping[str, ComputeSpec]) -> Iterator[Finding]:
    """The package behind `attention: flash_attention_2`."""
    wanting = [name for name, spec in kinds.items() if spec.kernels.attention == "flash_attention_2"]
    if wanting and not importable("flash_attn"):
        text = (
            f"compute.{wanting[0]}.kernels.attention is flash_attention_2, but {sys.executable} has no"
            " package flash-attn; install it (`pip install flash-attn --no-build-isolation`) or set"
            " attention: varlen"
        )
        yield Finding("flash-attn", False, text)


def check_compiler(kinds: Mapping[str, ComputeSpec]) -> Iterator[Finding]:
    """What compiles DeepSpeed's CPU Adam at its first use."""
    wanting = [name for name, spec in kinds.items() if spec.offload != "none"]
    if not wanting:
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++"]
    lacking = [] if any(shutil.which(name, path=path) for name in compilers) else ["a C++ compiler"]
    lacking += [] if shutil.which("ninja", path=path) else ["ninja"]
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    lacking += [] if header.is_file() else [f"Python's headers ({header})"]
    text = f"lacks {', '.join(lacking)}" if lacking else "a C++ compiler, Python's headers and ninja are here"
    yield Finding(
        "offload", not lacking, f"compute.{wanting[0]}.offload compiles DeepSpeed's CPU Adam; {text}"
    )


def check_shared_memory(kinds: Mapping[str, ComputeSpec]) -> Iterator[Finding]:
    """Room for the batches that data workers hand over through /dev/shm."""
    shared = Path("/dev/shm")
    wanted = {
        name: (
            spec.local_processes
            * (spec.dataloader_workers or 0)
            * READY_BATCHES
            * int(spec.per_device_batch_size)
            * PICTURE
        )
        for name, spec in kinds.items()
    }
    if not shared.is_dir() or not any(wanted.values()):
        return
    name = max(wanted, key=lambda key: wanted[key])
    free = shutil.disk_usage(shared).free
    text = (
        f"{free / GB:.1f} GB free; compute.{name} may fill {wanted[name] / GB:.1f} GB (dataloader_workers,"
        " per_device_batch_size)"
    )
    yield Finding("shared memory", free >= wanted[name], text, needed=False)


def check_space(plan: Plan) -> Iterator[Finding]:
    """Free space against what is still to fetch, to merge, to train and to keep."""
    needed = sum(size for _, size in disk_needs(plan, items_of(plan)))
    free = shutil.disk_usage(Path.cwd()).free
    text = (
        f"{free / GB:.0f} GB free, about {needed / GB:.0f} GB are needed in all (`snakemake -n` lists them)"
    )
    yield Finding("space", free >= needed, text, needed=False)


def check_fetched(plan: Plan) -> Iterator[Finding]:
    """Whether data and models are prepared: compute nodes may have no network."""
    wanted = [Path("data/sources") / name for name in plan.used_sources()]
    wanted += [Path("models") / name for name in plan.used_models()]
    missing = [str(path) for path in wanted if not (path / "manifest.json").is_file()]
    if missing:
        shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        text = (
            f"{len(missing)} of {len(wanted)} are not there yet ({shown}); they are fetched or made on the"
            " machine that runs Snakemake"
        )
        yield Finding("data and models", False, text, needed=False)
    else:
        yield Finding("data and models", True, "all are there; trainings need no network")
