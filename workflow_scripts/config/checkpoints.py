"""Which checkpoints that are not trained here can be asked: what their `config.json` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HF_TYPES = ("llava", "spatial_llava")


def layout_problem(described: Mapping[str, Any], layout: str) -> tuple[str, str] | None:
    """What is expected of a checkpoint in that layout and how to mend it, where ``described``, its
    `config.json`, is of something else.
    """
    original = "mm_vision_tower" in described and "text_config" not in described
    if layout == "llava":
        if original:
            return None
        fix = "leave layout out" if described.get("model_type") in HF_TYPES else "take a LLaVA checkpoint"
        return "a checkpoint in LLaVA's original layout (with mm_vision_tower in its config.json)", fix
    if described.get("model_type") in HF_TYPES and "text_config" in described:
        return None
    fix = "set layout: llava" if original else "take a LLaVA-1.5 checkpoint, or train it here"
    return f"a checkpoint of transformers with model_type {' or '.join(HF_TYPES)}", fix
