"""The register of language models: what LLaVA must know of a family beyond its transformers class.

A model type that is not listed is taken through :data:`GENERAL` when its class is a plain decoder (checked by
structure, see :func:`llava_ext.model.parts.check_language_model`). To add a family, add an entry. Plain
standard library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LanguageModel:
    """One family of language models.

    Which layers FSDP splits and what is tied are transformers' own statements (``_no_split_modules``,
    ``tie_word_embeddings``) and are read there.

    Attributes:
        title: its name in messages.
        padding: tokens that may fill up rows where the tokenizer has no ``<unk>`` and no padding token of its
            own, the first that the vocabulary has is taken. None of them occurs in a text, because padding is
            dropped from texts.
        turn_ends: tokens that end a turn in this family's chat templates. They are labels, so they never pad.
        original: ``model_type`` and class of LLaVA's own code for a model around it; None where LLaVA has
            none.
        liger: the function of Liger that fuses its layers.
    """

    title: str
    padding: tuple[str, ...] = ()
    turn_ends: tuple[str, ...] = ()
    original: tuple[str, str] | None = None
    liger: str = ""


# By transformers' model_type.
LANGUAGE_MODELS: dict[str, LanguageModel] = {
    "llama": LanguageModel(
        title="Llama (Vicuna, Llama 2 and 3)",
        padding=("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<pad>"),
        turn_ends=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
        original=("llava_llama", "LlavaLlamaForCausalLM"),
        liger="apply_liger_kernel_to_llama",
    ),
    "mistral": LanguageModel(
        title="Mistral",
        padding=("<pad>",),
        original=("llava_mistral", "LlavaMistralForCausalLM"),
        liger="apply_liger_kernel_to_mistral",
    ),
    "qwen2": LanguageModel(
        title="Qwen 2 and 2.5",
        padding=("<|endoftext|>", "<|fim_pad|>"),
        turn_ends=("<|im_end|>",),
        liger="apply_liger_kernel_to_qwen2",
    ),
    "qwen3": LanguageModel(
        title="Qwen 3",
        padding=("<|endoftext|>", "<|fim_pad|>"),
        turn_ends=("<|im_end|>",),
        liger="apply_liger_kernel_to_qwen3",
    ),
}
GENERAL = LanguageModel(title="another decoder", padding=("<pad>", "<|pad|>", "[PAD]"))


def language_model(model_type: str | None) -> LanguageModel:
    """The entry of a model type; :data:`GENERAL` when it has none."""
    return LANGUAGE_MODELS.get(model_type or "", GENERAL)


def known_language_models() -> str:
    """The register as a list for messages."""
    return ", ".join(f"{entry.title} ({name})" for name, entry in LANGUAGE_MODELS.items())


def text_settings(folder: str | Path) -> Mapping[str, Any]:
    """What `config.json` says of the language model in a folder: of an LLM, or of the LLM inside a LLaVA
    checkpoint; nothing where it can't be read.
    """
    try:
        described = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(described, Mapping):
        return {}
    inner = described.get("text_config")
    return inner if isinstance(inner, Mapping) else described


def text_model_type(folder: str | Path) -> str | None:
    """The model type of the language model in a folder."""
    kind = text_settings(folder).get("model_type")
    return original_text_type(str(kind)) or (str(kind) if kind else None)


def original_text_type(kind: str) -> str | None:
    """The language model's type that an original LLaVA ``model_type`` stands for (`llava_llama2d`,
    `llava`); None for others.
    """
    plain = kind.removesuffix("2d")
    if plain == "llava":
        return "llama"
    return next(
        (name for name, entry in LANGUAGE_MODELS.items() if (entry.original or ("",))[0] == plain), None
    )


def turn_end_ids(tokenizer: Any, entry: LanguageModel) -> set[int]:
    """Ids of the tokens that end an answer: the tokenizer's end token and those of the family that its
    vocabulary has.
    """
    known = tokenizer.get_vocab()
    ends = {known[token] for token in entry.turn_ends if token in known}
    return ends | ({tokenizer.eos_token_id} - {None})


def padding_token(tokenizer: Any, entry: LanguageModel) -> str | None:
    """The token that fills up rows: ``<unk>`` as in LLaVA, else the tokenizer's own, else one of the
    family's; None for lack of any.

    Never a token that ends an answer: padding is dropped from texts, and with it the label that ends the
    turn.
    """
    known, ends = tokenizer.get_vocab(), turn_end_ids(tokenizer, entry)
    candidates = (tokenizer.unk_token, tokenizer.pad_token, *entry.padding)
    return next((token for token in candidates if token in known and known[token] not in ends), None)
