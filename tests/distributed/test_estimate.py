"""The estimate of a GPU's memory against every peak that was measured, and against arithmetic by hand."""

from __future__ import annotations

import pytest

from llava_ext.distributed.estimate import (
    GIB,
    Decoder,
    Layout,
    Work,
    checkpointed_layers,
    needs,
)

VICUNA_7B = Decoder(layers=32, hidden=4096, intermediate=11008, vocabulary=32000)
TWELVE_LAYERS = Decoder(layers=12, hidden=4096, intermediate=11008, vocabulary=32000)
TOWER, PROJECTOR = 0.304e9, 20.98e6
STAGE_1 = 32 * 589  # micro-batch 32, 589 tokens a sample
PACKED, PADDED = 16 * 779, 16 * 779 * 3 // 2  # stage 2: a third of the padded batch is padding
EVERY_THIRD = 11

# float32 weights that train, under autocast; the LLM frozen in bf16
AUTOCAST = Layout(frozen=2, at_step=4, cast=2)
ZERO2 = Layout(split=2, weight=2, frozen=2, master=4, at_step=4 + 4)

# One H100 80GB, torch 2.11, transformers 5.23, bf16: GiB of `max_memory_allocated`.
MEASURED = [
    ("stage 1", 22.4, Work(STAGE_1, 32, False)),
    ("stage 1", 67.1, Work(STAGE_1, EVERY_THIRD, False)),
    ("stage 1", 20.9, Work(STAGE_1, 32, False, "liger")),
    ("stage 1", 51.8, Work(STAGE_1, EVERY_THIRD, False, "liger")),
    ("stage 1", 68.5, Work(STAGE_1, 0, False, "liger")),
    ("stage 1", 69.3, Work(STAGE_1, 0, False, "compile")),
    ("LoRA", 30.5, Work(PADDED, 32, True)),
    ("LoRA", 29.4, Work(PADDED, 32, True, "liger")),
    ("LoRA", 25.3, Work(PACKED, 32, True)),
    ("LoRA", 24.6, Work(PACKED, 32, True, "liger")),
    ("ZeRO-2, 12 layers", 61.3, Work(PADDED, 12, True)),
    ("ZeRO-2, 12 layers", 61.3, Work(PACKED, 12, True, "liger")),
    ("no engine, 12 layers", 51.2, Work(PADDED, 12, True)),
]


def estimated(kind, work):
    if kind == "stage 1":
        return needs(VICUNA_7B, AUTOCAST, PROJECTOR, VICUNA_7B.weights + TOWER, work)
    if kind == "LoRA":
        trained = VICUNA_7B.lora_weights(128) + PROJECTOR
        return needs(VICUNA_7B, AUTOCAST, trained, VICUNA_7B.weights + TOWER, work)
    layout = ZERO2 if kind.startswith("ZeRO-2") else AUTOCAST
    return needs(TWELVE_LAYERS, layout, TWELVE_LAYERS.weights + PROJECTOR, TOWER, work)


@pytest.mark.parametrize(("kind", "gib", "work"), MEASURED)
def test_measured_peaks(kind, gib, work):
    assert estimated(kind, work).peak / GIB == pytest.approx(gib, rel=0.1)


def test_what_ran_out_of_memory_does_not_fit():
    """Stage 1 without checkpointing on 79 GiB; 7B under ZeRO-2 on one card of 139.8 GiB."""
    assert estimated("stage 1", Work(STAGE_1, 0, False)).peak > 79 * GIB
    found = needs(VICUNA_7B, ZERO2, VICUNA_7B.weights, TOWER, Work(PADDED, 32, True))
    assert found.peak > 139.8 * GIB > found.weights + found.states + found.gradients


def test_sizes_of_known_models():
    """Vicuna 7B has 6,738,415,616 weights, its LoRA of rank 128 some 320 million; Qwen 2.5 7B 7.6 billion."""
    assert VICUNA_7B.weights == 6_738_415_616
    assert VICUNA_7B.lora_weights(128) == 319_815_680
    qwen = Decoder(layers=28, hidden=3584, intermediate=18944, vocabulary=152064, key_value_share=4 / 28)
    assert qwen.weights == pytest.approx(7.6157e9, rel=1e-4)


def test_llava_7b_by_engine():
    """In 10^9 bytes, by hand: 16 bytes a weight in float32; in half precision 2 + 2 and 12 for the
    optimizer.
    """
    ddp = Layout(frozen=2)
    zero2 = Layout(split=2, parts=8, weight=2, frozen=2, master=4)
    zero3 = Layout(split=3, parts=8, weight=2, frozen=2, master=4)
    found = [layout.bytes(6.76e9, 0.3e9) / 1e9 for layout in (ddp, zero2, zero3)]
    assert found == pytest.approx([108.8, 14.1 + 11.8, 13.6], abs=0.1)


def test_offload_leaves_the_optimizer_to_the_cpu():
    half = {"parts": 8, "weight": 2, "frozen": 2, "master": 4, "at_step": 8}
    assert Layout(split=2, offload="optimizer", **half).bytes(8e9, 0) == 16e9
    assert Layout(split=3, offload="optimizer", **half).bytes(8e9, 0) == 2e9
    assert Layout(split=3, offload="parameters", **half).bytes(8e9, 0) == 0


def test_float32_activations_are_twice_as_large():
    half, whole = (
        needs(VICUNA_7B, Layout(), 0, 0, Work(1000, 8, True, element=element)).activations
        for element in (2, 4)
    )
    assert whole == 2 * half


@pytest.mark.parametrize("room", [24, 40, 80])
def test_the_fewest_layers_that_fit(room):
    """One layer less would not fit; on a card of 80 GB a fused stage 1 recomputes nothing."""
    sizes = (VICUNA_7B, AUTOCAST, PROJECTOR, VICUNA_7B.weights + TOWER)
    count = checkpointed_layers(*sizes, Work(STAGE_1, 0, False, "liger"), room * GIB)
    fits = [needs(*sizes, Work(STAGE_1, n, False, "liger")).peak <= room * GIB for n in (count, count - 1)]
    assert fits[0] and (count == 0 or not fits[1])
    assert (count == 0) == (room == 80)


def test_too_little_for_any_number_of_layers():
    sizes = (VICUNA_7B, AUTOCAST, PROJECTOR, VICUNA_7B.weights + TOWER)
    assert checkpointed_layers(*sizes, Work(STAGE_1, 0, False), 12 * GIB) is None
