"""Recorded trainings on a CUDA GPU, through the real command line: precisions, kernels, engines, going on.

`LLAVA_TEST_DEVICE=cpu python -m pytest tests/golden/test_gpu.py` runs the same on the CPU.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from . import reference
from .test_trajectories import FAST, REPOSITORY, command_line, metrics, train

CPU = os.environ.get("LLAVA_TEST_DEVICE") == "cpu"
pytestmark = pytest.mark.slow if CPU else pytest.mark.gpu
DEVICE = {"use_cpu": CPU}
HALF = {"bf16": True}
FLOAT32_LOSS, HALF_LOSS = 1e-5, 1e-2
HALF_ADAPTERS_LOSS = 2e-2
VARIANTS: dict[str, tuple[dict[str, object], float]] = {
    "plain": ({}, FLOAT32_LOSS),
    "packed, varlen, fused": (FAST, FLOAT32_LOSS),
    "compiled": ({"fusion": "compile"}, FLOAT32_LOSS),
    "bf16": (HALF, HALF_LOSS),
    "bf16, packed, varlen, fused": (HALF | FAST, HALF_LOSS),
    "zero2": ({"deepspeed": "zero2.json"}, FLOAT32_LOSS),
    "zero3": ({"deepspeed": "zero3.json"}, FLOAT32_LOSS),
    "zero3, offload": ({"deepspeed": "zero3_offload.json"}, FLOAT32_LOSS),
    "zero2, bf16": ({"deepspeed": "zero2.json"} | HALF, HALF_LOSS),
}
TRAINING = "vanilla_stage2"


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_step_is_the_recorded_one(variant, root, tmp_path, report_difference):
    changes, bound = VARIANTS[variant]
    train(root, tmp_path, [TRAINING], **DEVICE | changes)
    recorded = reference.arrays(root / "train" / f"{TRAINING}.npz")
    difference = reference.largest([row["loss"] for row in metrics(tmp_path / TRAINING)], recorded["loss"])
    report_difference(f"{TRAINING}, {variant}", difference, bound)


@pytest.mark.parametrize("variant", ["plain", "packed, varlen, fused", "zero2"])
def test_a_training_that_goes_on_has_the_same_bits(variant, root, tmp_path):
    """From the checkpoint in the middle."""
    changes = DEVICE | VARIANTS[variant][0] | {"save_total_limit": 3, "save_steps": 10, "max_steps": 14}
    whole, again = (tmp_path / name / TRAINING for name in ("whole", "again"))
    train(root, whole.parent, [TRAINING], **changes)
    shutil.copytree(whole / "checkpoint-10", again / "checkpoint-10")
    shutil.copy(whole / "run_identity.json", again)
    train(root, again.parent, [TRAINING], **changes)
    found, expected = ([(row["step"], row["loss"]) for row in metrics(path)] for path in (again, whole))
    assert found == expected[10:]


def test_a_killed_training_goes_on_with_the_same_bits(root, tmp_path):
    """`kill -9` in the middle of a step, then the same command."""
    changes = DEVICE | {"save_total_limit": 2, "save_steps": 4, "max_steps": 10}
    whole, killed = (tmp_path / name / TRAINING for name in ("whole", "killed"))
    train(root, whole.parent, [TRAINING], **changes)
    command = [sys.executable, "-m", "llava_ext.train", *command_line(root, TRAINING, killed, **changes)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)
    while process.poll() is None and not any(killed.glob("checkpoint-4/complete*")):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()[-3000:]
    train(root, killed.parent, [TRAINING], **changes)
    found, expected = ({row["step"]: row["loss"] for row in metrics(path)} for path in (killed, whole))
    assert found == expected


def test_adapters_train_as_on_the_cpu(root, tmp_path, report_difference):
    """LoRA in float32, and packed in half precision, against the same training on the CPU."""
    lora = {"lora_enable": True, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "max_steps": 10}
    kinds = {"cpu": {"use_cpu": True}, "plain": DEVICE, "packed": DEVICE | FAST, "bf16": DEVICE | FAST | HALF}
    found = {}
    for name, changes in kinds.items():
        folder = train(root, tmp_path / name, [TRAINING], **lora | changes) / TRAINING
        found[name] = [row["loss"] for row in metrics(folder)]
    for name, bound in (("plain", FLOAT32_LOSS), ("packed", FLOAT32_LOSS), ("bf16", HALF_ADAPTERS_LOSS)):
        report_difference(f"LoRA, {name}", reference.largest(found[name], found["cpu"]), bound)
