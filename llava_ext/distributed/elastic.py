"""DeepSpeed's checkpoints on another number of processes.

ZeRO splits the optimizer's state by process. DeepSpeed's own converter turns such a checkpoint into one file
per parameter ("universal"), from which any number of processes takes its parts.

    python -m llava_ext.distributed.elastic CHECKPOINT FOLDER      converts checkpoint-N into FOLDER
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import patches
from ..errors import NoVerdict, TrainingError, say
from ..training import states

# The converter writes fragments, then the parameters that it joins from them.
ROOM = 2.0
LOG = "conversion.log"


def state_folder(checkpoint: Path) -> Path:
    """The folder inside ``checkpoint-N`` that holds DeepSpeed's files.

    Raises:
        TrainingError: there is none.
    """
    try:
        folder = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
    except OSError:
        raise TrainingError(f"{checkpoint}: holds no DeepSpeed state (no file `latest`)") from None
    if not folder.is_dir():
        raise TrainingError(f"{checkpoint}: `latest` names {folder.name}, which is not there")
    return folder


def check_room(checkpoint: Path, target: Path) -> None:
    """Raises NoVerdict when the converted state would not fit on the disk."""
    size = sum(path.stat().st_size for path in state_folder(checkpoint).glob("*_optim_states.pt"))
    free = shutil.disk_usage(target).free
    if free < ROOM * size:
        raise NoVerdict(
            f"{checkpoint}: continuing on another number of processes needs {ROOM * size / 2**30:.1f} GiB for"
            f" a while, {free / 2**30:.1f} GiB are free in {target}; make room, or continue with as many"
            " processes as before"
        )


def start_conversion(checkpoint: Path, folder: Path) -> subprocess.Popen[str]:
    """Starts the conversion of ``checkpoint`` into ``folder`` in a process of its own: it needs memory for
    a while.
    """
    check_room(checkpoint, folder.parent)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = [sys.executable, "-m", __name__, str(checkpoint), str(folder)]
    # it computes nothing: the GPUs stay with the training
    without_gpus = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with (folder / LOG).open("w", encoding="utf-8") as stream:
        return subprocess.Popen(command, env=without_gpus, stdout=stream, stderr=subprocess.STDOUT, text=True)


def convert_patiently(
    checkpoint: Path, folder: Path, on_first_rank: Callable[[Any], Any], beat: Callable[[], None]
) -> Path:
    """Converts on the first rank while the others wait, in pieces short enough for any time-out. Every
    rank must call.
    """
    running: list[subprocess.Popen[str]] = []

    def look() -> int | None:
        if not running:
            running.append(start_conversion(checkpoint, folder))
            say(f"converting {checkpoint.name} for another number of processes")
        try:
            return running[0].wait(timeout=20)
        except subprocess.TimeoutExpired:
            return None

    while (status := on_first_rank(look)) is None:
        beat()
    if status:
        raise NoVerdict(
            f"{checkpoint}: DeepSpeed could not convert it (status {status}); see {folder / LOG}, "
            "or continue with as many processes as before"
        )
    return folder


def load_universal(engine: Any, folder: Path) -> Any:
    """Gives ``engine`` the state that was converted into ``folder``; returns what DeepSpeed's loader
    returns.
    """
    config = engine._config
    config.load_universal_checkpoint = True
    try:
        loaded = type(engine).load_checkpoint(engine, str(folder), load_module_strict=False)
    finally:
        config.load_universal_checkpoint = False
    if engine.zero_optimization_partition_weights():
        patches.separate_groups(engine.optimizer.optimizer, _stated_groups(folder))
    return loaded


def _stated_groups(folder: Path) -> list[dict[str, Any]]:
    """The optimizer's parameter groups as they were saved."""
    state = folder / (folder / "latest_universal").read_text(encoding="utf-8").strip()
    path = state / "zero/optimizer_state.pt"
    return torch.load(path, map_location="cpu", weights_only=True)["param_groups"]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module's docs."""
    parser = argparse.ArgumentParser(prog=f"python -m {__name__}", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a complete checkpoint-N")
    parser.add_argument("folder", type=Path, help="where the universal checkpoint goes")
    options = parser.parse_args(argv)
    problem = states.Checkpoint(options.checkpoint, 0).problem(contents=False)
    if problem:
        raise SystemExit(f"error: {options.checkpoint}: {problem}")
    source = state_folder(options.checkpoint)
    patches.read_only_tensors()
    from deepspeed.checkpoint import ds_to_universal

    workers = min(2, os.cpu_count() or 1)
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(source),
            output_folder=str(options.folder / f"{source.name}_universal"),
            num_extract_workers=workers,
            num_merge_workers=workers,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


if __name__ == "__main__":
    main()
