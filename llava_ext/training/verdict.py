"""The end of a training that will repeat: its reason stands in ``train_result.json``, so that nobody tries
again in vain.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import NoVerdict, TrainingError
from ..files import read_json
from . import claim, states
from .console import message
from .llava_flags import split_flags

CUDA_ERROR_MEMORY_ALLOCATION = 2


def reason(error: BaseException) -> str | None:
    """Why an error is a verdict, for people; None for one that another attempt may not meet."""
    if is_out_of_memory(error):
        return (
            f"out of memory on the GPU of rank {os.environ.get('RANK', '0')}: {str(error).splitlines()[0]} "
            + "".join(f"{note} " for note in getattr(error, "__notes__", ()))
            + "Lower --per_device_train_batch_size (and accumulate over as many more: the same steps), set"
            " --checkpoint_layers all, or split or offload more (--deepspeed, --fsdp)"
        )
    if isinstance(error, NoVerdict) or not isinstance(error, (TrainingError, ValueError)):
        return None
    return message(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU had too little memory: what torch's allocator says, or a library below it."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, torch.AcceleratorError)
        and getattr(error, "error_code", None) == CUDA_ERROR_MEMORY_ALLOCATION
    )


def record(argv: Sequence[str], why: str) -> None:
    """Writes the verdict of the training that the command line names, unless its folder says more already."""
    folder = _output_dir(argv)
    if folder is None or not folder.is_dir() or not _is_mine(folder):
        return
    known = read_json(folder / states.RESULT) or {}
    if known.get("status") in ("finished", states.VERDICT):
        return
    good = (item.step for item in states.checkpoints(folder) if item.problem(contents=False) is None)
    states.write_result(folder, states.VERDICT, next(good, 0), reason=why)


def _is_mine(folder: Path) -> bool:
    """Whether no other training holds the folder. Only the first rank holds it for all."""
    return int(os.environ.get("RANK", "0")) > 0 or claim.is_free(folder)


def _output_dir(argv: Sequence[str]) -> Path | None:
    try:
        given = [values[0] for name, values in split_flags(argv) if name == "output_dir" and values]
    except TrainingError:
        return None
    return Path(given[-1]) if given else None
