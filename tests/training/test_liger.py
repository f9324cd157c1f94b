"""Liger's real kernels compute the plain step: on a GPU, and on a CPU in Triton's interpreter.

    TRITON_INTERPRET=1 python -m pytest tests/training/test_liger.py

needs liger-kernel (envs/requirements-liger.txt) and triton. The interpreter takes milliseconds a token and
kernel, so the samples are short.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch
from transformers import AutoTokenizer

from llava_ext.data.assembly import Collator
from llava_ext.data.conversation import encode
from llava_ext.data.dataset import TrainingCollator
from llava_ext.data.images import ImagePreprocessor
from llava_ext.errors import TrainingError
from llava_ext.model.build import build_model
from llava_ext.model.language_models import LANGUAGE_MODELS
from llava_ext.training import kernels
from llava_ext.training.lora import add_adapters
from tests.support.families import make_llm
from tests.support.models import LLM, TOWER, flags, one_thread, picture  # noqa: F401
from tests.support.triton_cpu import interpret, keep_transformers
from tests.training.test_kernels import OTHER_FORMULA, assert_equal, choose, step

pytest.importorskip("liger_kernel", reason="needs liger-kernel (envs/requirements-liger.txt)")

FEW_TOKENS = {"compression_after_projection": True, "final_spatial_size": 1}
# With one vision token the grid has no second row; four have.
GRID = FEW_TOKENS | {"final_spatial_size": 4, "twoD_vision_embedding": True}
HALF = 2e-2
CAPTIONS = ("red", "a blue one")


ON_CPU = pytest.param("cpu", marks=pytest.mark.slow)
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=[ON_CPU, ON_GPU])
def device(request, monkeypatch):
    if request.param == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("needs TRITON_INTERPRET=1 from the start: Triton's kernels are interpreted")
        interpret(monkeypatch)
    return torch.device(request.param)


@pytest.fixture
def make(tmp_path, monkeypatch, device):
    """``make(kind, **interventions)``: a tiny model around such an LLM, its tokenizer, image processor."""

    def build(kind, **interventions):
        make_llm(tmp_path / kind, kind, AutoTokenizer.from_pretrained(LLM))
        torch.manual_seed(5)
        parts = build_model(tmp_path / kind, TOWER, flags(**FEW_TOKENS | interventions))
        keep_transformers(monkeypatch, parts[0].model.language_model)
        return parts[0].to(device), *parts[1:]

    return build


def short_batch(parts, packed):
    """Captions of a few tokens, of different lengths."""
    model, tokenizer, images = parts
    preprocess = ImagePreprocessor.from_processor(images, "pad")
    samples = []
    for index, text in enumerate(CAPTIONS):
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}]
        encoded = encode({"id": text, "image": "a.png", "conversations": turns}, tokenizer, "plain", 512)
        pixels = [preprocess(picture(index))]
        samples.append(
            {
                "index": index,
                "id": text,
                "input_ids": encoded.input_ids,
                "labels": encoded.labels,
                "images": pixels,
            }
        )
    return TrainingCollator(Collator.for_model(model.config, tokenizer, packed=packed))(samples)


def both_ways(parts):
    """Steps of padded rows, and of a packed one by segments with every second layer recomputed."""
    found = []
    for packed, kind, every in ((False, "sdpa", 0), (True, "varlen", 2)):
        choose(parts[0], kind, every)
        found.append(step(parts[0], short_batch(parts, packed)))
    return found


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_liger_computes_the_plain_step(kind, make):
    """Of every registered language model, and nothing of it is left as it was."""
    parts = make(kind)
    language = parts[0].model.language_model
    expected = both_ways(parts)
    assert len(kernels.unfused(language, True)) > 2 * language.config.num_hidden_layers
    kernels.fuse(parts[0], "liger")
    assert not kernels.unfused(language, True)
    for found, plain in zip(both_ways(parts), expected, strict=True):
        assert_equal(found, plain, OTHER_FORMULA)


def test_liger_fuses_layers_with_adapters(make):
    """LoRA's adapters are in the layers when they are fused, as in a training; on a GPU under autocast."""
    parts = make("llama")
    model = add_adapters(parts[0], rank=4, alpha=8, dropout=0.0, bias="none", autocast=False)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    choose(parts[0], "varlen", 2)
    batch, place = short_batch(parts, True), parts[0].device.type
    exact = step(parts[0], batch)
    kernels.fuse(model.get_base_model(), "liger")
    assert_equal(step(parts[0], batch), exact, OTHER_FORMULA)
    if place == "cpu":
        return  # the interpreter knows no bfloat16
    with torch.autocast(place, torch.bfloat16):
        assert abs(step(parts[0], batch)[0] - exact[0]) < HALF


@pytest.mark.parametrize("published", [False, True])
def test_positions_in_two_dimensions_stay_right(published, make):
    """By Liger's rotation, but for the published table, which it would get wrong."""
    parts = make("llama", **GRID, published_behaviour=published)
    model, batch = parts[0], short_batch(parts, False)
    choose(model, "sdpa")
    expected = step(model, batch)
    kernels.fuse(model, "liger")
    assert not kernels.unfused(model.model.language_model, not published)
    found = step(model, batch)
    assert_equal(found, expected, OTHER_FORMULA)
    if published:
        model.config.published_behaviour = False
        kernels.fuse(model, "liger")
        model.config.published_behaviour = True
        with pytest.raises(AssertionError):
            assert_equal(step(model, batch), expected, OTHER_FORMULA)


def test_what_liger_leaves_as_it_was_stops_the_training(make, monkeypatch):
    """A flag that does nothing would be taken for one that does: parts that another release of either library
    does not fuse, and a rotation that an earlier model of this process has left behind.
    """
    import liger_kernel.transformers

    parts = make("llama", **GRID, published_behaviour=True)
    with monkeypatch.context() as patch:
        patch.setattr(liger_kernel.transformers, "apply_liger_kernel_to_llama", lambda **kwargs: None)
        with pytest.raises(TrainingError, match=r"does not change 7 parts .*layers\.0\.mlp"):
            kernels.fuse(parts[0], "liger")
    attention = sys.modules[type(parts[0].model.language_model).__module__]
    monkeypatch.setattr(attention, kernels.ROTATION, liger_kernel.transformers.liger_rotary_pos_emb)
    with pytest.raises(TrainingError, match=r"does not change 1 parts .*the rotation"):
        kernels.fuse(parts[0], "liger")
