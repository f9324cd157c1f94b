"""Checkpoints with interventions, and all others of ours, as a model of lmms-eval.

lmms-eval's own `llava_hf` runs vanilla exports; it refuses a model type that it does not know, and writes the
picture's place into the text, which loses a token behind it. Here prompts are tokenised as in training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms
from PIL import Image

from ...analysis.generation import generate_ids
from ...analysis.speaker import load_speaker
from ...data.conversation import inference_prompt

LONGEST = 1024
"""Tokens of an answer where a task does not say it, as for `llava_hf`."""


class SpatialLlava(lmms):
    """Answers greedily, in batches.

    Args:
        pretrained: the folder of an exported checkpoint.
        device: default: a GPU where there is one.
        dtype: the name of a type of torch.
        permute_seed: shuffles each picture's vision tokens.

    Raises:
        BuildError: no checkpoint, or an incomplete one.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        permute_seed: int | str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"spatial_llava: no argument {next(iter(unknown))!r}; see its class")
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        usual = "float32" if chosen == "cpu" else "bfloat16"
        self.speaker = load_speaker(Path(pretrained), torch.device(chosen), getattr(torch, dtype or usual))
        self.batch_size = int(batch_size)
        self.permute_seed = None if permute_seed is None else int(permute_seed)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers, in the order of the requests."""
        # Those of one length of answers together: a task has one, several tasks may have others.
        order = sorted(range(len(requests)), key=lambda place: _longest(requests[place]))
        found: dict[int, str] = {}
        while order:
            longest = _longest(requests[order[0]])
            places = [i for i in order[: self.batch_size] if _longest(requests[i]) == longest]
            found |= zip(places, self._answers([requests[i] for i in places], longest), strict=True)
            order = order[len(places) :]
        return [found[place] for place in range(len(requests))]

    def _answers(self, requests: list[Any], longest: int) -> list[str]:
        speaker = self.speaker
        prompts = []
        for request in requests:
            picture, text = self._picture(request), request.args[0].replace("<image>", "").strip()
            prompt = inference_prompt(text, speaker.version, picture is not None, speaker.tokenizer)
            prompts.append((picture, prompt))
        rows = generate_ids(
            speaker.model,
            speaker.tokenizer,
            prompts,
            speaker.preprocess,
            longest,
            self.permute_seed,
            speaker.version,
        )
        return [str(speaker.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in rows]

    def _picture(self, request: Any) -> Image.Image | None:
        _, _, doc_to_visual, place, task, split = request.args
        shown = doc_to_visual(self.task_dict[task][split][place]) or []
        if len(shown) > 1:
            raise ValueError(f"{task}, question {place}: {len(shown)} pictures; this model takes one")
        return shown[0].convert("RGB") if shown else None

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not offered: LLaVA's benchmarks are answers in words."""
        raise NotImplementedError("spatial_llava answers in words; choose a task of generate_until")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("spatial_llava answers one question at a time")


def _longest(request: Any) -> int:
    return int(request.args[1].get("max_new_tokens") or LONGEST)
