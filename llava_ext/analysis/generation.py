"""Greedy answers to questions about images, in batches: what an evaluation needs from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data.assembly import Collator
from ..data.conversation import end_ids, inference_ids, inference_prompt
from ..data.images import ImagePreprocessor
from ..data.templates import IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from .diagnostics import permuted_vision_tokens

Question = tuple[Image.Image | None, str]


def prompt_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[Image.Image | None, str]],
    preprocess: ImagePreprocessor,
    version: str = "v1",
) -> dict[str, Tensor]:
    """Prompts (with `<image>` where the picture goes) as a left-padded batch for ``generate``, tokenised as
    training does.

    Raises:
        ValueError: a prompt with a picture but no `<image>`, or the reverse.
    """
    samples = []
    for image, prompt in prompts:
        if (image is not None) != (prompt.count(IMAGE_TOKEN) == 1):
            raise ValueError(
                f"a prompt needs one {IMAGE_TOKEN} if it has a picture and none otherwise; found"
                f" {prompt!r:.120}"
            )
        # A text without picture may hold the word <image>; here it may not, so nothing is ambiguous.
        ids = inference_ids(tokenizer, prompt, version, image is not None)
        assert ids.count(IMAGE_TOKEN_INDEX) == int(image is not None)
        samples.append(
            {"input_ids": ids, "labels": ids, "images": [] if image is None else [preprocess(image)]}
        )
    batch = Collator.for_model(model.config, tokenizer, padding_side="left")(samples)
    batch.pop("labels")
    batch.pop("image_token_counts", None)  # nothing is cut
    return {name: value.to(model.device) for name, value in batch.items()}


@torch.no_grad()
def generate_ids(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[Image.Image | None, str]],
    preprocess: ImagePreprocessor,
    max_new_tokens: int = 32,
    permute_seed: int | None = None,
    version: str = "v1",
    **options: Any,
) -> list[list[int]]:
    """New ids of each prompt, greedy unless ``options`` say otherwise, up to and including the end token;
    no padding.
    """
    batch = prompt_batch(model, tokenizer, prompts, preprocess, version)
    ends = end_ids(tokenizer, version)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    settings: dict[str, Any] = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "num_beams": 1,
        "eos_token_id": ends,
    }
    was_training = model.training
    model.eval()
    try:
        with ExitStack() as stack:
            stack.enter_context(permuted_vision_tokens(model, seed=permute_seed))
            output = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                **(settings | options),
            )
    finally:
        model.train(was_training)
    return [_until_end(row, ends) for row in output[:, batch["input_ids"].shape[1] :].tolist()]


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The ids up to and including the first end token."""
    return next((ids[: index + 1] for index, token in enumerate(ids) if token in ends), ids)


def answer(
    model: Any,
    tokenizer: Any,
    image_processor: Any,
    questions: Sequence[Question],
    version: str = "v1",
    max_new_tokens: int = 32,
    image_aspect_ratio: str | None = None,
    permute_seed: int | None = None,
    batch_size: int = 16,
) -> list[str]:
    """Greedy answers as text, in the order of the questions.

    Args:
        image_processor: transformers' image processor of the checkpoint (or an :class:`ImagePreprocessor`).
        questions: (picture or None, question) pairs.
        image_aspect_ratio: `pad` or `square`; None takes the checkpoint's (its config, then its image
            processor).
        permute_seed: shuffle each picture's vision tokens by this seed before the LLM sees them.
        batch_size: questions per forward pass.
    """
    preprocess = image_processor
    if not isinstance(preprocess, ImagePreprocessor):
        preprocess = ImagePreprocessor.from_processor(
            image_processor, image_aspect_ratio or model.config.image_aspect_ratio
        )
    answers: list[str] = []
    for chunk in _batches(questions, batch_size):
        prompts = [
            (image, inference_prompt(question, version, image is not None, tokenizer))
            for image, question in chunk
        ]
        new = generate_ids(model, tokenizer, prompts, preprocess, max_new_tokens, permute_seed, version)
        answers += [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new]
    return answers


def _batches(items: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
