"""Tiny real model folders (language model, CLIP tower, tokenizer) and samples for the model's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava_ext.data.assembly import Collator
from llava_ext.data.conversation import encode
from llava_ext.data.images import ImagePreprocessor
from llava_ext.model.build import build_model
from llava_ext.model.interventions import Interventions

DATA = Path(__file__).parents[1] / "golden" / "data"
LLM, TOWER = DATA / "llm", DATA / "clip_g4"

# Each flag alone, with values that fit a tower of 4x4 patches and 24 layers.
ALONE: dict[str, dict[str, Any]] = {
    "normalize_projector": {"normalize_projector": True, "normalize_statistics": "auto"},
    "use_multilayer_features": {"use_multilayer_features": True, "multilayer_layers": (3, 9, 20)},
    "compression_after_projection": {"compression_after_projection": True, "final_spatial_size": 4},
    "twoD_vision_embedding": {"twoD_vision_embedding": True},
    "interleave": {"interleave": True, "interleave_sparsity": 2},
    "add_spatial_coordinates": {"add_spatial_coordinates": True},
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(interventions: Interventions | None = None, **options: Any):
    """A model with a projector that depends on its shape only, in evaluation mode."""
    torch.manual_seed(5)
    model, tokenizer, image_processor = build_model(LLM, TOWER, interventions, **options)
    return model.eval(), tokenizer, image_processor


def flags(*names: str, **more: Any) -> Interventions:
    values: dict[str, Any] = {}
    for name in names:
        values |= ALONE[name]
    return Interventions(**values | more)


RECORDS = [
    {
        "id": "one",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhere is the star?"},
            {"from": "gpt", "value": "Above the square."},
        ],
    },
    {
        "id": "text",
        "conversations": [
            {"from": "human", "value": "Count to 5."},
            {"from": "gpt", "value": "1, 2, 3, 4, 5."},
            {"from": "human", "value": "Thank you"},
            {"from": "gpt", "value": "Hello!"},
        ],
    },
    {
        "id": "long",
        "image": "b.png",
        "conversations": [
            {"from": "human", "value": "What color is the circle?\n<image>"},
            {"from": "gpt", "value": "The circle is red."},
            {"from": "human", "value": "How many objects are there?"},
            {"from": "gpt", "value": "2"},
        ],
    },
]


def picture(seed: int) -> Image.Image:
    """A picture of noise; another seed, another picture."""
    pixels = torch.randint(
        0, 256, (48, 64, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return Image.fromarray(pixels.numpy())


def make_samples(
    tokenizer: Any, image_processor: Any, records: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    preprocess = ImagePreprocessor.from_processor(image_processor, "pad")
    samples = []
    for index, record in enumerate(RECORDS if records is None else records):
        encoded = encode(record, tokenizer, "v1", 2048)
        images = [preprocess(picture(index))] if "image" in record else []
        samples.append(
            {"id": record["id"], "input_ids": encoded.input_ids, "labels": encoded.labels, "images": images}
        )
    return samples


def make_batch(
    model: Any, tokenizer: Any, image_processor: Any, records: Any = None, **options: Any
) -> dict[str, Any]:
    return Collator.for_model(model.config, tokenizer, **options)(
        make_samples(tokenizer, image_processor, records)
    )
