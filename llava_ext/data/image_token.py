"""`<image>` as a token: added for checkpoints and for chat templates, taken out for training's text."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Regex, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from ..files import write_json
from .templates import IMAGE_TOKEN

MARK = "▁"  # sentencepiece's word mark

_MARKS_ONCE: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def marks_once(tokenizer: Any) -> bool:
    """True for sentencepiece-like tokenizers that do not put a second mark before a chunk that starts with
    a space.
    """
    if tokenizer not in _MARKS_ONCE:
        pieces = tokenizer.tokenize("a")
        _MARKS_ONCE[tokenizer] = (
            bool(pieces) and pieces[0].startswith(MARK) and tokenizer.tokenize(" a") == pieces
        )
    return _MARKS_ONCE[tokenizer]


def with_image_token(tokenizer: Any) -> Any:
    """A copy of the tokenizer in which `<image>` is one special token, after all others."""
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return extended


def image_token_id(tokenizer: Any) -> int:
    """The id that `<image>` has in exported checkpoints: the first that the tokenizer does not use."""
    return int(with_image_token(tokenizer).convert_tokens_to_ids(IMAGE_TOKEN))


def with_marked_images(tokenizer: Any, block: str) -> Any:
    """As :func:`with_image_token`, and the text behind a picture begins with a word mark, as LLaVA's training
    has it.

    LLaVA tokenises the text between pictures piece by piece, and each piece begins with a mark; a tokenizer
    that sees the whole prompt puts none behind a special token. Here its own normalizer adds the space that
    becomes the mark, so a prompt has training's ids however it was written.

    Args:
        block: the text that a processor puts in the place of one picture: `<image>`s, and coordinates among
            them.
    """
    if not marks_once(tokenizer):
        return with_image_token(tokenizer)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    last = IMAGE_TOKEN + block.rpartition(IMAGE_TOKEN)[2]
    inside = rf"{IMAGE_TOKEN}|\d+,\d+{IMAGE_TOKEN}" if "," in block else IMAGE_TOKEN
    space = normalizers.Replace(Regex(rf"{last}(?!{inside}|\z)"), f"{last} ")
    backend.normalizer = (
        normalizers.Sequence([backend.normalizer, space]) if backend.normalizer is not None else space
    )
    backend.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=True)])
    return _as_stored(tokenizer, backend)


def without_added_ids(tokenizer: Any) -> Any:
    """As :func:`with_image_token`, and nothing is put around a text: a chat template writes its own first
    token.
    """
    extended = with_image_token(tokenizer)
    backend = extended.backend_tokenizer
    if backend.num_special_tokens_to_add(is_pair=False) == 0:
        return extended
    description = json.loads(backend.to_str())
    description["post_processor"] = None
    return _as_stored(tokenizer, Tokenizer.from_str(json.dumps(description)))


def _as_stored(tokenizer: Any, backend: Tokenizer) -> Any:
    """A tokenizer that is read back exactly as its tokenizer.json says; model-specific classes would build
    their own parts again.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens_map,
    )


def name_tokenizer(folder: Path, tokenizer: Any, name: str) -> None:
    """Writes which class reads a tokenizer that was saved as a general one: transformers 4, and with it
    LLaVA's own loader, does not know the name that transformers 5 gives it.
    """
    if type(tokenizer) is PreTrainedTokenizerFast:
        path = folder / "tokenizer_config.json"
        write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": name})


def remove_image_token(tokenizer: Any) -> None:
    """Takes a special `<image>` token, and the rule that marks what is behind it, out of the tokenizer, in
    place.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in description["added_tokens"] if token["content"] != IMAGE_TOKEN]
    if len(kept) == len(description["added_tokens"]) or IMAGE_TOKEN in description["model"].get("vocab", {}):
        return
    description["added_tokens"] = kept
    description["normalizer"] = _without_marking(description["normalizer"])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(description))


def _without_marking(normalizer: Any) -> Any:
    """A normalizer's description without the rule of :func:`with_marked_images`."""
    if not isinstance(normalizer, dict):
        return normalizer
    if normalizer["type"] == "Sequence":
        kept = [item for item in map(_without_marking, normalizer["normalizers"]) if item is not None]
        return kept[0] if len(kept) == 1 else {"type": "Sequence", "normalizers": kept} if kept else None
    ours = normalizer["type"] == "Replace" and IMAGE_TOKEN in normalizer["pattern"].get("Regex", "")
    return None if ours else normalizer
