"""Answers: batches equal single questions, a cache changes nothing, the permutation hook works."""

from __future__ import annotations

import itertools

import pytest
import torch

from llava_ext.analysis.diagnostics import permuted_vision_tokens
from llava_ext.analysis.generation import answer, generate_ids
from llava_ext.data.images import ImagePreprocessor
from llava_ext.model.interventions import FLAGS
from tests.support.models import flags, make_batch, make_model, picture

QUESTIONS = [
    (picture(0), "What color is the circle?"),
    (None, "Count to 5."),
    (picture(2), "Is it blue?"),
    (picture(3), "Hello"),
]


@pytest.mark.parametrize(
    "names", [(), *[(name,) for name in FLAGS], FLAGS], ids=lambda names: "+".join(names) or "vanilla"
)
def test_a_batch_answers_as_single_questions_do(names):
    model, tokenizer, images = make_model(flags(*names))
    options = {"version": "v1", "max_new_tokens": 8, "image_aspect_ratio": "pad"}
    together = answer(model, tokenizer, images, QUESTIONS, **options)
    alone = [answer(model, tokenizer, images, [question], **options)[0] for question in QUESTIONS]
    assert together == alone
    assert together == answer(model, tokenizer, images, QUESTIONS, batch_size=3, **options)


@pytest.mark.parametrize(
    "names", [("twoD_vision_embedding", "interleave"), FLAGS], ids=["2D+interleave", "all"]
)
def test_decoding_with_a_cache_equals_decoding_without(names):
    model, tokenizer, images = make_model(flags(*names))
    preprocess = ImagePreprocessor.from_processor(images, "pad")
    prompts = [(picture(0), "<image>\nWhere is the star? ASSISTANT:"), (None, "Hello ASSISTANT:")]
    runs = [
        generate_ids(model, tokenizer, prompts, preprocess, 8, use_cache=cached) for cached in (True, False)
    ]
    assert runs[0] == runs[1]


def test_a_prompt_and_its_picture_must_agree():
    model, tokenizer, images = make_model()
    preprocess = ImagePreprocessor.from_processor(images, "pad")
    for prompt in ((picture(0), "no place for it"), (None, "<image>\nwhere?")):
        with pytest.raises(ValueError, match="needs one <image>"):
            generate_ids(model, tokenizer, [prompt], preprocess)


def test_permutation_is_seeded_and_undone():
    model, tokenizer, images = make_model()
    batch = make_batch(model, tokenizer, images)

    def logits():
        with torch.no_grad():
            return model(**batch).logits

    plain = logits()
    with permuted_vision_tokens(model, seed=1):
        first = logits()
    with permuted_vision_tokens(model, seed=1):
        assert torch.equal(logits(), first)
    with permuted_vision_tokens(model, seed=2):
        assert not torch.equal(logits(), first)
    assert not torch.equal(plain, first)
    assert torch.equal(logits(), plain)


def test_permutation_moves_whole_tokens():
    model, tokenizer, images = make_model()
    pixels = make_batch(model, tokenizer, images)["pixel_values"]
    plain = torch.stack(model.get_image_features(pixels).pooler_output)
    order = list(itertools.chain(range(8, 16), range(8)))
    with permuted_vision_tokens(model, order=order):
        moved = torch.stack(model.get_image_features(pixels).pooler_output)
    assert torch.equal(moved, plain[:, order])
    with (
        pytest.raises(ValueError, match="a permutation of 16 is expected"),
        permuted_vision_tokens(model, order=[0, 0]),
    ):
        model.get_image_features(pixels)


def test_permuted_answers_come_from_the_hook():
    model, tokenizer, images = make_model()
    options = {"max_new_tokens": 8, "image_aspect_ratio": "pad"}
    plain = answer(model, tokenizer, images, QUESTIONS, **options)
    permuted = answer(model, tokenizer, images, QUESTIONS, permute_seed=3, **options)
    assert permuted == answer(model, tokenizer, images, QUESTIONS, permute_seed=3, **options)
    assert permuted[1] == plain[1]  # no picture, nothing to permute
    assert plain == answer(model, tokenizer, images, QUESTIONS, **options)
