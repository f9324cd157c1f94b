"""Real trainings of a tiny model: starting them, interrupting them, reading what they wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support import warm

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "data"

BASE = {
    "model_name_or_path": "llm",
    "vision_tower": "clip_g4",
    "image_folder": "images",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "model_max_length": 2048,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "logging_steps": 1,
    "save_steps": 4,
    "save_total_limit": 2,
    "report_to": "none",
    "use_cpu": True,
}
STAGES = {
    1: {"version": "plain", "data_path": "train/stage1.json", "tune_mm_mlp_adapter": True},
    2: {
        "version": "v1",
        "data_path": "train/stage2.json",
        "image_aspect_ratio": "pad",
        "group_by_modality_length": True,
        "pretrain_mm_mlp_adapter": "train/vanilla_stage1_mm_projector.bin",
    },
}


def command_line(stage: int, output_dir: Path, **changes: object) -> list[str]:
    """Flags of a short training of that stage."""
    flags = BASE | STAGES[stage] | {"output_dir": output_dir} | changes
    return [text for name, value in flags.items() if value is not None for text in (f"--{name}", str(value))]


def environment(**changes: str) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    return kept | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | changes


def start(argv: Sequence[str], log: Path) -> subprocess.Popen:
    """Starts a training as a user would; its output goes to ``log``."""
    command = [sys.executable, "-m", "llava_ext.train", *argv]
    with log.open("ab") as stream:
        return subprocess.Popen(
            command, cwd=GOLDEN, env=environment(), stdout=stream, stderr=stream, start_new_session=True
        )


def run(
    argv: Sequence[str],
    log: Path,
    processes: int = 1,
    expect: int = 0,
    timeout: float = 900,
    before: Callable[[], object] | None = None,
    **env: str,
) -> str:
    """Runs a training to its end and returns its log; ``before`` is called in its process ahead of it."""
    size = log.stat().st_size if log.exists() else 0
    module, deepspeed = "llava_ext.train", "--deepspeed" in argv
    status = warm.run(module, argv, log, GOLDEN, environment(**env), timeout, processes, deepspeed, before)
    text = log.read_bytes()[size:].decode(errors="replace")
    assert status == expect, text[-4000:]
    return text


TRACED = "a layer is traced"


def trace_only() -> None:
    """Before a training: torch's compiler runs what it has traced, said in a line, and writes no code for
    this processor, which takes minutes.
    """
    from llava_ext.training import kernels

    kernels.BACKEND = _run_traced


def _run_traced(graph: Any, inputs: object) -> Callable[..., object]:
    print(TRACED, file=sys.stderr, flush=True)
    return graph.forward


def rows(output_dir: Path) -> list[dict]:
    """The whole lines of metrics.jsonl so far."""
    path = output_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def losses(output_dir: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in rows(output_dir)]


def result(output_dir: Path) -> dict:
    return json.loads((output_dir / "train_result.json").read_text())


def wait_for(condition: Callable[[], object], process: subprocess.Popen, timeout: float = 900) -> None:
    """Waits until ``condition`` holds while the process lives."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, "the training ended before the test could interrupt it"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)
