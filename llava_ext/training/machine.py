"""The command line on this machine: GPUs, TF32, FSDP."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import NoVerdict
from .llava_flags import is_on, split_flags

DEVICES = Path("/dev")
# More would only fill memory: pictures for 16 tokens each, the hungriest case, take four cores a GPU.
MOST_WORKERS = 8


def tf32_works() -> bool:
    """Whether the GPU has TF32 (Ampere or newer)."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8


def free_cores() -> int:
    """Cores for the dataset workers of one process: its share of those that it may use, less its own."""
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(share - 1, MOST_WORKERS))


def fit_machine(argv: list[str], notices: list[str]) -> list[str]:
    """Adds ``--use_cpu`` where there is no GPU, so that bf16 and everything else run on the CPU."""
    import torch

    if not torch.cuda.is_available() and (why := _why_a_gpu_is_wanted(argv)):
        raise NoVerdict(
            f"{why}, but torch {torch.__version__} can use no GPU here; {_cuda_error()}. --use_cpu True"
            " trains on the CPU"
        )
    cpu = not torch.cuda.is_available() or _given_switch(argv, "use_cpu")
    argv = _fit_fsdp(argv, cpu and torch.cuda.is_available(), notices)
    if not cpu:
        if torch.cuda.device_count() > 1 and "RANK" not in os.environ:
            notices.append(
                f"one of {torch.cuda.device_count()} GPUs is used; start with torchrun to use more"
            )
        return argv
    if _given_switch(argv, "bf16"):
        notices.append("no GPU here: --bf16 runs on the CPU")
    return argv if _given_switch(argv, "use_cpu") else [*argv, "--use_cpu", "True"]


def _why_a_gpu_is_wanted(argv: Sequence[str]) -> str:
    """In words, or nothing. A machine with GPUs is not meant to compute for days on its CPU because of a
    driver.
    """
    given = [is_on(values) for name, values in split_flags(argv) if name == "use_cpu"]
    if given:
        return "" if given[-1] else "--use_cpu False"
    found = sorted(path.name for path in DEVICES.glob("nvidia[0-9]*"))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return f"this machine has {DEVICES / found[0]}" if found and not hidden else ""


def _cuda_error() -> str:
    """Why CUDA can't be used, in torch's words."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"it says: {str(error).splitlines()[0]}"
    return "it gives no reason"


def _fit_fsdp(argv: list[str], beside_gpu: bool, notices: list[str]) -> list[str]:
    """Takes ``--fsdp`` away where nothing can be split: one process, or the CPU of a machine whose GPU
    torch would use.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if "--fsdp" not in argv or not (alone or beside_gpu):
        return argv
    why = "one process" if alone else "--use_cpu on a machine with a GPU"
    notices.append(f"--fsdp is ignored: {why}; every process holds the whole model")
    return [text for flag, values in split_flags(argv) if flag != "fsdp" for text in (f"--{flag}", *values)]


def _given_switch(argv: Sequence[str], name: str) -> bool:
    return any(flag == name and is_on(values) for flag, values in split_flags(argv))
