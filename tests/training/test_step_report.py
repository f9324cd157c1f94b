"""A step asks its device for nothing but its report, which is read before the optimizer changes a weight."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from llava_ext.errors import TrainingError
from llava_ext.training.step_report import StepReports
from llava_ext.training.trainer import LlavaTrainer
from tests.support.trainings import command_line
from tests.support.waits import counted

STEPS = 2
# Read once a step, when the backward pass is queued; the numbers that go with it never leave the host.
REPORT = {"step_report.py:read _local_scalar_dense", "step_report.py:read tolist"}
REPORT |= {"step_report.py:__init__ tensor"}
# The loss and the norm of the gradients, once for the only log line.
LOG_LINE = {"trainer.py:_maybe_log_save_evaluate _local_scalar_dense": 2}
# Where samples stand in the epoch: numpy's, on the host.
HOST = {"_start_workers", "length_grouped_order", "modality_grouped_order"}
ALL_FLAGS = {
    "add_spatial_coordinates": True,
    "compression_after_projection": True,
    "final_spatial_size": 4,
    "interleave": True,
    "normalize_projector": True,
    "use_multilayer_features": True,
}
COUNTED = {"tokens": 9, "text": 7, "supervised": 5, "samples": 2, "pairs": 25, "images": 2}
SEGMENTS = {"attention": "varlen", "pack": True, "checkpoint_layers": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "others"),
    [
        (SEGMENTS | ALL_FLAGS | {"twoD_vision_embedding": True}, {}),
        ({"attention": "varlen", "twoD_vision_embedding": True, "published_behaviour": True}, {}),
        (SEGMENTS | {"lora_enable": True, "lora_r": 4, "bf16": True, "max_grad_norm": 1.0}, {}),
        # transformers looks whether a row is packed, once a forward pass; varlen has no mask to make
        ({"attention": "sdpa"}, {"masking_utils.py:find_packed_sequence_indices _local_scalar_dense": 2}),
    ],
    ids=["varlen, packed, every intervention", "published", "LoRA", "sdpa"],
)
def test_no_step_waits_but_for_its_report_and_the_log_line(flags, others, tmp_path, train_here, monkeypatch):
    found: Counter[str] = Counter()
    run_epoch = LlavaTrainer._run_epoch

    def watched(trainer, *args, **kwargs):
        with counted() as waits:
            run_epoch(trainer, *args, **kwargs)
        found.update(waits)

    monkeypatch.setattr(LlavaTrainer, "_run_epoch", watched)
    short = {"max_steps": STEPS, "num_train_epochs": None, "logging_steps": STEPS, "save_strategy": "no"}
    short |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    short |= {"dataloader_num_workers": 1, "preflight_samples": 4, "pretrain_mm_mlp_adapter": None}
    status, log = train_here(
        command_line(2, tmp_path, optim="adamw_torch_fused", **short, **flags),
    )
    assert status == 0, log
    waits = {name: number for name, number in found.items() if name.split(":")[1].split()[0] not in HOST}
    micro_batches = {name: number * STEPS for name, number in others.items()}
    assert waits == dict.fromkeys(REPORT, STEPS) | LOG_LINE | micro_batches


def test_the_report_is_read_before_a_weight_changes():
    """Of two micro-batches the one whose loss is no number is named."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    reports = StepReports(lambda indices: [f"sample {index}" for index in indices])
    state = SimpleNamespace(global_step=6)
    reports.on_train_begin(None, state, None, optimizer=optimizer)
    for number, factor in enumerate((1.0, torch.nan, torch.inf)):
        loss = (weight * factor).sum()
        reports.add(loss, COUNTED, [number, number + 10], last=number == 2)
        loss.backward()
    with pytest.raises(TrainingError, match="the loss is nan at step 7") as error:
        optimizer.step()
    assert "sample 1\nsample 11\n" in str(error.value)
    assert torch.equal(weight.detach(), torch.ones(3)) and not reports.take_counts()["tokens"]


def test_what_steps_have_counted_is_taken_once():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    reports = StepReports(lambda indices: [])
    reports.on_train_begin(None, SimpleNamespace(global_step=0), None, optimizer=optimizer)
    for _ in range(2):
        for last in (False, True):
            reports.add(torch.tensor(0.5), COUNTED, [1], last=last)
        optimizer.step()
    assert reports.take_counts() == {
        "tokens": 36, "text_tokens": 28, "supervised_tokens": 20, "samples": 8, "attention_pairs": 100,
        "images": 8,
    }  # fmt: skip
    assert reports.take_recent() == (2.0, 20, 28)
    assert set(reports.take_counts().values()) == {0} and reports.take_recent() == (0, 0, 0)
