"""Recorded trainings on a CUDA GPU, through the real command line: precisions, kernels, engines, going on.

`LLAVA_TEST_DEVICE=cpu python -m pytest tests/golden/test_gpu.py` runs the same on the CPU.
"""

from __future__ import annotations

import os
import shutil

import pytest

from . import reference
from .test_trajectories import FAST, metrics, train

CPU = os.environ.get("LLAVA_TEST_DEVICE") == "cpu"
pytestmark = pytest.mark.slow if CPU else pytest.mark.gpu
DEVICE = {"use_cpu": CPU}
HALF = {"bf16": True}
FLOAT32_LOSS, HALF_LOSS = 1e-5, 1e-2
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
