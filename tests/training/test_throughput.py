"""Operations of a training: the formula against torch's own counter, and the numbers that a training logs."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_ext.flops import CARDS, Counted, Products, layer_weights, lora_weights, picture_flops
from llava_ext.training.lora import add_adapters
from llava_ext.training.optimizer import freeze
from llava_ext.training.throughput import Throughput, products_of
from llava_ext.training.vision_tower import train_tower
from tests.support.models import RECORDS, flags, make_model
from tests.support.trainings import command_line
from tests.training.test_kernels import batch_of, choose

WAYS = {
    "stage 1": {"tune_mm_mlp_adapter": True, "freeze_mm_mlp_adapter": False, "freeze_backbone": False},
    "full": {"tune_mm_mlp_adapter": False, "freeze_mm_mlp_adapter": False, "freeze_backbone": False},
}


def prepared(way, interventions):
    """A small model of which the parts of that way train; its tokenizer and image processor."""
    model, tokenizer, images = make_model(interventions)
    if way == "lora":
        model = add_adapters(model, rank=4, alpha=8, dropout=0.0, bias="none")
    elif way == "with the tower":
        freeze(model, **WAYS["full"])
        train_tower(model)
    else:
        freeze(model, **WAYS[way])
    return model, tokenizer, images


def counted(model, batch):
    """What torch counts in a forward and a backward pass with the logits of all tokens."""
    for name in ("indices", "counts", "labels", "predicting", "targets"):
        batch.pop(name)
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(**batch).logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "interventions", [flags(), flags("compression_after_projection")], ids=["all", "few"]
)
@pytest.mark.parametrize("way", ["stage 1", "lora", "full", "with the tower"])
def test_the_formula_counts_what_torch_counts(way, interventions):
    """One sample with its picture; torch counts every pair of tokens, also those that nobody sees."""
    model, tokenizer, images = prepared(way, interventions)
    plain = model.get_base_model() if way == "lora" else model
    choose(plain, "eager")
    plain.model.vision_tower.set_attn_implementation("eager")  # torch has no count for another on the CPU
    batch = batch_of((plain, tokenizer, images), False, RECORDS[:1])
    tokens = batch["input_ids"].shape[1]
    assert batch["counts"]["pairs"] == tokens * (tokens + 1) // 2 and batch["counts"]["images"] == 1
    expected = products_of(model).flops(Counted(tokens, tokens**2, labels=tokens, images=1))
    # the tower's last layer and its patches hand nothing down, which the formula takes to be as elsewhere
    bound = 0.03 if way == "with the tower" else 0.003
    assert counted(model, batch) == pytest.approx(expected, rel=bound)


def test_answers_take_a_forward_pass_alone():
    model, tokenizer, images = prepared("full", flags())
    choose(model, "eager")
    model.model.vision_tower.set_attn_implementation("eager")
    batch = batch_of((model, tokenizer, images), False, RECORDS[:1])
    tokens = batch["input_ids"].shape[1]
    for name in ("indices", "counts", "labels", "predicting", "targets"):
        batch.pop(name)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(**batch)
    expected = products_of(model).forward(Counted(tokens, tokens**2, labels=tokens, images=1))
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.003)


def test_a_7b_step_is_what_was_measured():
    """LLaVA-1.5-7B in stage 1: 16.0 TFLOP a sample of 589 tokens, from a profile of its products."""
    text = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "patch_size": 14}
    products = Products(
        layers=32 * layer_weights(text), attention=32 * 4096, head=32000 * 4096,
        picture=picture_flops(tower, side=24, before=1), patches=576, projector=(1024 * 4096, 4096**2),
    )  # fmt: skip
    found = products.flops(Counted(589, 589 * 590 / 2, labels=13, images=1))
    assert found / 1e12 == pytest.approx(16.0, rel=0.02)
    assert lora_weights(text, 128) == 319_815_680


def test_packing_does_not_change_the_work():
    parts = make_model(flags())
    padded, packed = (batch_of(parts, way)["counts"] for way in (False, True))
    assert padded == packed and padded["images"] > 0


def test_a_known_card_has_a_share_and_another_none():
    products = Products(1e9, 0, 0, 0, 0, (0, 0), learns=True)
    logs = {"tokens": 1000, "attention_pairs": 0, "supervised_tokens": 0, "images": 0}
    peak = CARDS["NVIDIA H100 80GB HBM3"]
    row = Throughput(products, processes=2, peak=peak).row(logs, seconds=0.5)
    assert row["flops"] == 6e12 and row["tflop_per_s"] == pytest.approx(6.0)
    assert row["peak_share"] == pytest.approx(6e12 / peak)
    assert "peak_share" not in Throughput(products).row(logs, 0.5)


def test_a_training_logs_what_it_computed(train_here, tmp_path):
    """Real steps on the CPU: the logged operations are those of the logged tokens, in the logged time."""
    status, _ = train_here(command_line(2, tmp_path / "out", max_steps=3, pack=True))
    assert status == 0
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        seconds = row["tokens"] / row["tokens_per_s"]
        assert row["flops"] / seconds / 1e12 == pytest.approx(row["tflop_per_s"])
        assert 0 <= row["data_wait_share"] <= 1 and "peak_share" not in row  # no card of the register
    # more tokens, more operations: by about the weights of the LLM's layers
    assert len({row["flops"] / row["tokens"] for row in rows}) == 3
    spread = [row["flops"] / row["tokens"] for row in rows]
    assert max(spread) < 2 * min(spread)
