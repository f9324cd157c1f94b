"""What somebody adds who follows CONTRIBUTING: an entry in a register, nothing else. Here it is made in the
test's own file.

As a program the file registers its entry and trains with the command line's flags: the way in is that of
every training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from llava_ext.checkpoints.stored import load_model
from llava_ext.model.interventions import InterventionError, Interventions
from llava_ext.model.poolings import POOLINGS, Pooling
from llava_ext.model.towers import TOWERS, Tower
from llava_ext.training.identity import IDENTITY
from tests.support import warm
from tests.support.models import make_batch, make_model
from tests.support.trainings import GOLDEN, command_line, environment, losses

# -- what is added -----------------------------------------------------------------------------------------


def maximum(tokens: Tensor, side: int) -> Tensor:
    """The largest value of each channel in each window: (images, g * g, hidden) -> (images, side * side,
    hidden).
    """
    images, count, hidden = tokens.shape
    step = round(count**0.5) // side
    return tokens.view(images, side, step, side, step, hidden).amax((2, 4)).flatten(1, 2)


MAXIMUM = Pooling("maximum", "the largest value of each channel", maximum)

VIT = Tower(title="ViT", closing_norm="layernorm", processor="ViTImageProcessorPil", class_token=True)

# ----------------------------------------------------------------------------------------------------

# The interventions that a training recorded before there was a choice of poolings.
EARLIER = {
    "normalize_projector": False,
    "normalize_statistics": "vicuna-7b",
    "projector_max_norm": None,
    "projector_scale": None,
    "use_multilayer_features": False,
    "multilayer_layers": [12, 16, 20, 24],
    "compression_after_projection": True,
    "final_spatial_size": 4,
    "twoD_vision_embedding": False,
    "interleave": False,
    "interleave_sparsity": None,
    "add_spatial_coordinates": False,
    "published_behaviour": False,
}
COMPRESS = {"compression_after_projection": True, "final_spatial_size": 4}


@pytest.fixture
def with_maximum(monkeypatch):
    monkeypatch.setitem(POOLINGS, MAXIMUM.name, MAXIMUM)


@pytest.fixture
def vit(tmp_path) -> Path:
    """The folder of a tiny tower of the added kind, as transformers writes it."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(4)
    tower = ViTModel(ViTConfig(**sizes, image_size=56, patch_size=14))
    tower.save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 56, "width": 56}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def train(
    output_dir: Path, stage: int = 1, expect: int = 0, program: str = __name__, **changes: object
) -> str:
    """A training of two steps in a process that has the additions; what it printed."""
    short = {"max_steps": 2, "num_train_epochs": None, "save_steps": 1, "gradient_accumulation_steps": 1}
    flags = command_line(stage, output_dir, **short | COMPRESS | changes)
    log = output_dir.with_suffix(".log")
    status = warm.run(program, flags, log, GOLDEN, environment(), timeout=300)
    assert status == expect, log.read_text()[-3000:]
    return log.read_text()


def test_a_new_pooling_needs_its_entry(with_maximum):
    model, tokenizer, images = make_model(Interventions(**COMPRESS, pooling="maximum"))
    pixels = make_batch(model, tokenizer, images)["pixel_values"]
    plain, _, _ = make_model()
    with torch.no_grad():
        pooled = torch.stack(model.get_image_features(pixels).pooler_output)
        tokens = torch.stack(plain.get_image_features(pixels).pooler_output)
    for row in range(2):
        for column in range(2):
            window = tokens.view(len(tokens), 4, 4, -1)[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(pooled[:, 2 * row + column], window.amax((1, 2)))


@pytest.mark.slow
def test_a_training_from_before_the_choice_of_poolings_goes_on(tmp_path):
    train(tmp_path / "whole")
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", begun / "checkpoint-1")
    recorded = json.loads((tmp_path / "whole" / IDENTITY).read_text())
    rest = {key: value for key, value in recorded.items() if not key.startswith("interventions.")}
    earlier = {f"interventions.{name}": value for name, value in EARLIER.items()}
    (begun / IDENTITY).write_text(json.dumps(rest | earlier))
    assert "continuing from" in train(begun)
    assert losses(begun) == losses(tmp_path / "whole")[1:]
    assert json.loads((begun / IDENTITY).read_text()) == rest | earlier


def test_every_pooling_gives_the_tokens_that_the_language_model_waits_for(with_maximum):
    for name, entry in POOLINGS.items():
        assert entry.name == name and entry.doc
        for side in (1, 2, 3, 6):
            assert entry.pool(torch.randn(2, 36, 5), side).shape == (2, side * side, 5), name


@pytest.mark.slow
def test_a_new_pooling_trains_continues_and_is_saved(tmp_path, with_maximum):
    train(tmp_path / "average")
    train(tmp_path / "maximum", pooling="maximum")
    assert losses(tmp_path / "maximum") != losses(tmp_path / "average")
    stored = json.loads((tmp_path / "maximum" / "config.json").read_text())["spatial_llava"]
    assert stored["interventions"]["pooling"] == "maximum" and stored["loads_with"] == ["llava_ext"]
    refused = train(tmp_path / "maximum", expect=1, pooling="average", max_steps=2)
    assert "interventions.pooling: 'maximum' when it was started, now None" in refused


@pytest.mark.slow
def test_a_new_tower_with_a_new_pooling_trains_both_stages(tmp_path, vit, with_maximum, monkeypatch):
    chosen = {"vision_tower": vit, "pooling": "maximum", "use_multilayer_features": True}
    chosen |= {"multilayer_layers": "[2,4]"}
    train(tmp_path / "one", **chosen)
    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(tmp_path / "one" / "checkpoint-1", again / "checkpoint-1")
    assert "continuing from" in train(again, **chosen)
    assert losses(again) == losses(tmp_path / "one")[1:]

    train(tmp_path / "two", stage=2, **chosen, pretrain_mm_mlp_adapter=tmp_path / "one")
    monkeypatch.setitem(TOWERS, "vit", VIT)
    model, _, _ = load_model(tmp_path / "two")
    kept = ViTModel.from_pretrained(vit).state_dict()
    weights = model.model.vision_tower.state_dict()
    assert kept and all(torch.equal(weights[name], tensor) for name, tensor in kept.items())
    assert model.config.interventions.pooling == "maximum" and model.config.tokens_per_image == 4


@pytest.mark.slow
def test_a_tower_without_an_entry_is_refused_with_the_list(tmp_path, vit):
    said = train(tmp_path / "out", program="llava_ext.train", expect=1, vision_tower=vit)
    assert "found a vit model as the vision tower; a registered one is expected: CLIP" in said


def test_without_its_entry_it_is_refused_with_the_list():
    with pytest.raises(InterventionError, match="pooling: found 'maximum'; allowed are average; choose one"):
        Interventions(**COMPRESS, pooling="maximum").validate()


if __name__ == "__main__":
    from llava_ext import train as entry

    POOLINGS[MAXIMUM.name] = MAXIMUM
    TOWERS["vit"] = VIT
    entry.main()
