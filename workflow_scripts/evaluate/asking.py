"""Asks a checkpoint questions about pictures, in batches, greedily."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workflow_scripts.config.evaluation import TaskSpec
from workflow_scripts.evaluate.checkpoint import Checkpoint, permuted_tokens
from workflow_scripts.evaluate.conditions import Condition, permutation_seed
from workflow_scripts.evaluate.tasks.task import Question
from workflow_scripts.io import UserError, digest

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Answer:
    """What a checkpoint said: the digest of the prompt, the text, the text with special tokens, its ids."""

    prompt: str
    text: str
    raw: str
    tokens: list[int]


def prompts_of(processor: Any, questions: Sequence[Question], with_picture: bool = True) -> list[str]:
    """The questions in the checkpoint's own chat template."""
    picture = [{"type": "image"}] if with_picture else []
    return [
        processor.apply_chat_template(
            [{"role": "user", "content": [*picture, {"type": "text", "text": item.text}]}],
            add_generation_prompt=True,
        )
        for item in questions
    ]


def prompt_batch(processor: Any, prompts: Sequence[str], pictures: Sequence[Image.Image] | None) -> Any:
    """Left-padded inputs of ``generate``."""
    images = {} if pictures is None else {"images": list(pictures)}
    return processor(text=list(prompts), **images, padding=True, return_tensors="pt", add_special_tokens=True)


def decode_picture(name: str, data: bytes) -> Image.Image:
    """RGB pixels. Raises UserError for what is no picture."""
    from PIL import Image

    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"picture {name}: can't be decoded ({error}); replace it in the source") from None


class Chunk:
    """Questions that are asked together, with their pictures decoded once for all conditions."""

    def __init__(self, questions: Sequence[Question], pictures: Mapping[str, Image.Image]) -> None:
        self.questions = list(questions)
        self.pictures = pictures

    def shown(self, questions: Sequence[Question], condition: Condition, blank: Any) -> Any:
        """The pictures that go with the questions under a condition; None for none."""
        from PIL import Image

        if condition.name == "text_only":
            return None
        found = [self.pictures[item.image] for item in questions]
        if condition.name != "blank":
            return found
        return [Image.new("RGB", picture.size, tuple(blank)) for picture in found]


def generate(
    checkpoint: Checkpoint, batch: Any, seeds: Sequence[int] | None, max_new_tokens: int
) -> list[list[int]]:
    """New ids of each row, greedily, up to and including the end token; no padding."""
    import torch

    model, tokenizer = checkpoint.model, checkpoint.processor.tokenizer
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    permuted = nullcontext() if seeds is None else permuted_tokens(model, seeds)
    with torch.no_grad(), permuted:
        output = model.generate(
            **inputs,
            do_sample=False,
            temperature=None,
            top_p=None,
            max_length=None,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    ends = _end_ids(model)
    return [_until_end(row, ends) for row in rows]


def _end_ids(model: Any) -> set[int]:
    found = model.generation_config.eos_token_id
    return set(found if isinstance(found, list) else [found])


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    return next((ids[: place + 1] for place, token in enumerate(ids) if token in ends), ids)


def answer(
    checkpoint: Checkpoint, chunk: Chunk, questions: Sequence[Question], condition: Condition, spec: TaskSpec
) -> list[Answer]:
    """The answers to some of a chunk's questions under one condition, in their order."""
    pictures = chunk.shown(questions, condition, spec.blank_colour)
    prompts = prompts_of(checkpoint.processor, questions, pictures is not None)
    batch = prompt_batch(checkpoint.processor, prompts, pictures)
    seed = spec.permute_seed + condition.seed
    permuted = condition.name == "permuted"
    seeds = [permutation_seed(seed, item) for item in questions] if permuted else None
    found = generate(checkpoint, batch, seeds, spec.max_new_tokens)
    decode = checkpoint.processor.tokenizer.decode
    return [
        Answer(digest(prompt, 16), decode(ids, skip_special_tokens=True).strip(), decode(ids), ids)
        for prompt, ids in zip(prompts, found, strict=True)
    ]
