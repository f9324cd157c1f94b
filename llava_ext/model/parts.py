"""The parts of a model from their folders or the hub: vision tower, language model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
)

from ..errors import TrainingError
from .folders import BuildError, tower_config
from .language_models import (
    LANGUAGE_MODELS,
    known_language_models,
    text_model_type,
)


def resolve_model(name: str, flag: str, cache_dir: str | None) -> Path:
    """A model's folder: itself, or the hub's snapshot (from the cache first; the network only if it must).

    Raises:
        TrainingError: neither a folder nor a reachable hub id.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise TrainingError(f"--{flag} {name}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, cache_dir=cache_dir, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    patterns = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=patterns))
    except (OSError, HfHubHTTPError) as error:
        offline = " (offline mode is on)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise TrainingError(
            f"--{flag} {name}: no such folder, not in the cache, and the hub did not answer{offline}: {error}"
        ) from error


def load_tower(folder: str | Path, dtype: torch.dtype | None, attn_implementation: str | None) -> Any:
    """A registered vision tower, or the vision part of such a model, with every weight found.

    Raises:
        BuildError: another kind of model, or weights that are not all there.
    """
    config = tower_config(folder)
    tower, info = AutoModel.from_pretrained(
        str(folder),
        config=config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        output_loading_info=True,
    )
    require_complete(folder, info, unexpected=False)
    return tower


def check_language_model(folder: str | Path) -> None:
    """Refuses a language model that the model could not be built around, before any weight is read.

    A registered family passes; any other is built without memory and must be a plain decoder. Of a LLaVA
    checkpoint its language model is looked at.

    Raises:
        BuildError: names what the class lacks, and the registered families.
    """
    if text_model_type(folder) in LANGUAGE_MODELS:
        return
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BuildError(f"{folder}: {error}; allowed are {known_language_models()}") from None
    config = getattr(config, "text_config", config)
    lacking = ["a transformers class for causal language models"]
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        with torch.device("meta"):
            lacking = _not_plain(AutoModelForCausalLM.from_config(config))
    if lacking:
        raise BuildError(
            f"{folder}: found a {config.model_type} model, which lacks {', '.join(lacking)}; allowed are "
            f"{known_language_models()}, and any other plain decoder of transformers"
        )


# What a causal language model of transformers does between its head and its logits, or beside them; LLaVA's
# has no place for it.
BESIDE_THE_HEAD = (
    "logits_scaling",
    "logit_scale",
    "lm_head_multiplier",
    "final_logit_softcapping",
    "output_router_logits",
)


def _not_plain(model: Any) -> list[str]:
    """What a causal language model lacks of a plain decoder, in words; empty when it is one."""
    base, found = model.base_model, []
    if not isinstance(getattr(base, "layers", None), nn.ModuleList):
        found.append("a list of decoder layers named `layers`")
    if type(getattr(base, "embed_tokens", None)) is not nn.Embedding:
        found.append("a plain embedding table named `embed_tokens`")
    if not hasattr(base, "norm"):
        found.append("a closing norm named `norm`")
    if not _plain_rotary(getattr(base, "rotary_emb", None)):
        found.append("one rotary table for all layers, named `rotary_emb`")
    head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        found.append("a linear `lm_head` without bias")
    beside = [name for name in BESIDE_THE_HEAD if getattr(model.config, name, None) is not None]
    return found + [f"logits that are the head's alone (its config has {name})" for name in beside]


def _plain_rotary(rotary: Any) -> bool:
    return rotary is not None and list(inspect.signature(rotary.forward).parameters) == ["x", "position_ids"]


def load_llm(folder: str | Path, dtype: torch.dtype | None, attn_implementation: str | None) -> Any:
    """A causal language model with every weight found. Raises :class:`BuildError` otherwise."""
    check_language_model(folder)
    model, info = AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=False,
        output_loading_info=True,
    )
    require_complete(folder, info, unexpected=False)
    return model


def require_complete(folder: str | Path, info: Mapping[str, Any], unexpected: bool = True) -> None:
    """transformers only prints what was missing; here it is an error."""
    kinds = ["missing_keys", "mismatched_keys", *(["unexpected_keys"] if unexpected else [])]
    for kind in kinds:
        if info[kind]:
            names = sorted(str(name) for name in info[kind])
            raise BuildError(
                f"{folder}: {len(names)} {kind.replace('_', ' ')}, e.g. {', '.join(names[:4])}; the weights"
                " do not belong to this kind of model, or the files are not all there"
            )
