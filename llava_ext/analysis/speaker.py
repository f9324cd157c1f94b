"""A checkpoint that answers questions about one picture, a piece of text at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import TextStreamer

from ..checkpoints.stored import load_model
from ..data.conversation import inference_prompt
from ..data.images import ImagePreprocessor
from .generation import generate_ids

Show = Callable[[str], None]


@dataclass(frozen=True)
class Speaker:
    """A loaded checkpoint and how it is asked.

    Attributes:
        version: the template that it was trained with.
        permute_seed: shuffles each picture's vision tokens before the LLM sees them; None leaves them.
    """

    name: str
    model: Any
    tokenizer: Any
    preprocess: ImagePreprocessor
    version: str
    permute_seed: int | None = None

    def permuted(self, seed: int) -> Speaker:
        """The same weights, asked with shuffled vision tokens."""
        return replace(self, name=f"{self.name}, vision tokens permuted ({seed})", permute_seed=seed)

    def answer(
        self,
        image: Image.Image | None,
        question: str,
        history: Sequence[tuple[str, str]] = (),
        show: Show = lambda piece: None,
        max_new_tokens: int = 256,
    ) -> str:
        """The greedy answer; ``show`` gets its words while they are made.

        Args:
            history: earlier questions about the same picture, and this speaker's answers.

        Raises:
            ValueError: `<image>` in the question without a picture, or more than once.
        """
        prompt = inference_prompt(question, self.version, image is not None, self.tokenizer, history)
        (ids,) = generate_ids(
            self.model,
            self.tokenizer,
            [(image, prompt)],
            self.preprocess,
            max_new_tokens,
            self.permute_seed,
            self.version,
            streamer=_Pieces(self.tokenizer, show),
        )
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


class _Pieces(TextStreamer):
    """Hands whole words on as soon as they are there, instead of printing them."""

    def __init__(self, tokenizer: Any, show: Show) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text)


def load_speaker(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    version: str | None = None,
    image_aspect_ratio: str | None = None,
) -> Speaker:
    """A checkpoint of ours, of stock LLaVA, or in the original layout.

    Args:
        version, image_aspect_ratio: default: what the checkpoint says it was trained with, else LLaVA-1.5's
            `v1` and `pad`.

    Raises:
        BuildError: no checkpoint, or an incomplete one.
    """
    model, tokenizer, image_processor = load_model(folder, dtype=dtype)
    model.eval().to(device)
    ratio = image_aspect_ratio or model.config.image_aspect_ratio or "pad"
    return Speaker(
        name=str(folder),
        model=model,
        tokenizer=tokenizer,
        preprocess=ImagePreprocessor.from_processor(image_processor, ratio),
        version=version or model.config.prompt_version or "v1",
    )
