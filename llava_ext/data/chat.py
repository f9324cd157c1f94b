"""A tokenizer's own chat template: ids as ``apply_chat_template`` gives them, labels on what the assistant
writes.

No template is known here by its markers. An answer begins where the prompt that asks for it ends (the
conversation up to there, rendered with the generation prompt), and ends with the first token that the
template puts behind it. So a label stands on exactly what the model will have to write. A template for which
the prompt of an answer is not the beginning of the whole conversation can't be learnt this way and is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from tokenizers import Tokenizer

from .image_token import with_image_token
from .templates import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
    PICTURES_IN_TEXT,
    STOPPED_CLOCK,
    ConversationError,
)

Message = dict[str, str]

# A conversation whose words occur in no template.
PROBE: list[Message] = [
    {"role": "user", "content": f"{IMAGE_TOKEN}\nWhat is quibbled?"},
    {"role": "assistant", "content": "A zorble."},
    {"role": "user", "content": "And where?"},
    {"role": "assistant", "content": "Under the wuggish."},
]


class ChatTemplate:
    """One tokenizer's template, with the tokenizer in which `<image>` is a token.

    Raises:
        ConversationError: the tokenizer has no template, or one that does not say where an answer ends.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ConversationError(
                f"prompt version `chat`: the tokenizer in {tokenizer.name_or_path} has no chat template; put"
                " its chat_template.jinja beside it, or use another prompt version"
            )
        # Not the tokenizer itself: it is the key of a weak dictionary, whose values may not hold it.
        self._extended = with_image_token(tokenizer)
        self.source = STOPPED_CLOCK + self._extended.get_chat_template()
        self.image_id = int(self._extended.convert_tokens_to_ids(IMAGE_TOKEN))
        self.end = self._find_end()
        self._check(tokenizer.pad_token_id)

    @property
    def exported(self) -> str:
        """The template for a processor: content may be a list of parts, or text with `<image>` inside."""
        return PICTURES_IN_TEXT + self.source

    @property
    def end_id(self) -> int:
        """The id of the token that ends an answer."""
        return int(self._extended.convert_tokens_to_ids(self.end))

    def render(self, messages: Sequence[Message], ask: bool = False) -> str:
        """The conversation as text; with ``ask`` it ends where the answer begins."""
        try:
            text: str = self._extended.apply_chat_template(
                list(messages), chat_template=self.source, tokenize=False, add_generation_prompt=ask
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ConversationError(f"the tokenizer's chat template refuses it: {error}") from None
        return text

    def ids(self, text: str, pictures: bool) -> list[int]:
        """Ids of a rendered text; with ``pictures`` each `<image>` is -200."""
        return self._ids_and_places(text, pictures)[0]

    def encode(self, messages: Sequence[Message], pictures: bool) -> tuple[list[int], list[int]]:
        """Ids of the whole conversation, and labels that are -100 outside of the assistant's turns."""
        text = self.render(messages)
        ids, places = self._ids_and_places(text, pictures)
        labels = [IGNORE_INDEX] * len(ids)
        index = 0
        for start, end in self._answers(messages, text):
            while index < len(ids) and places[index][0] < end:
                if places[index][1] > start and ids[index] != IMAGE_TOKEN_INDEX:
                    labels[index] = ids[index]
                index += 1
        return ids, labels

    def _ids_and_places(self, text: str, pictures: bool) -> tuple[list[int], list[tuple[int, int]]]:
        backend = self._with_image if pictures or IMAGE_TOKEN not in text else self._without_image
        found = backend.encode(text, add_special_tokens=False)
        image = self.image_id if pictures else None
        return [IMAGE_TOKEN_INDEX if token == image else token for token in found.ids], found.offsets

    @cached_property
    def _with_image(self) -> Tokenizer:
        return self._backend(keep_image=True)

    @cached_property
    def _without_image(self) -> Tokenizer:
        """For conversations without picture, in which `<image>` is ordinary text."""
        return self._backend(keep_image=False)

    def _backend(self, keep_image: bool) -> Tokenizer:
        description = json.loads(self._extended.backend_tokenizer.to_str())
        # It adds nothing here, but would cut spaces off the tokens' places in the text.
        description["post_processor"] = description["truncation"] = description["padding"] = None
        if not keep_image:
            description["added_tokens"] = [
                token for token in description["added_tokens"] if token["content"] != IMAGE_TOKEN
            ]
        return Tokenizer.from_str(json.dumps(description))

    def _answers(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Where each of the assistant's turns begins and ends in ``text``, in characters, its end token
        included.
        """
        found: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:index], ask=True)
            if not text.startswith(prompt):
                raise ConversationError(_not_a_prefix(index, text, prompt))
            content = message["content"].strip()
            begin = text.find(content, len(prompt))
            end = text.find(self.end, begin + len(content))
            if begin < 0 or end < 0:
                what = "ends no answer there with" if begin >= 0 else "changes the words of the answer before"
                raise ConversationError(f"turn {index}: the tokenizer's chat template {what} {self.end!r}")
            if found and found[-1][1] > len(prompt):
                raise ConversationError(
                    f"turn {index}: the tokenizer's chat template does not end the answer before it with"
                    f" {self.end!r}"
                )
            found.append((len(prompt), end + len(self.end)))
        return found

    def _find_end(self) -> str:
        """The token that ends an answer: the first special one behind it."""
        text = self.render(PROBE)
        behind = text.rpartition(PROBE[-1]["content"])[2]
        special = set(self._extended.all_special_ids) | {
            index for index, token in self._extended.added_tokens_decoder.items() if token.special
        }
        ends = [token for token in self.ids(behind, pictures=False) if token in special]
        if not ends:
            raise ConversationError(
                "prompt version `chat`: the tokenizer's chat template puts no special token behind an answer"
                f" (it ends with {text[-30:]!r}), so a model could not learn where to stop; use another"
                " template"
            )
        return str(self._extended.convert_ids_to_tokens(ends[0]))

    def _check(self, pad_id: int | None) -> None:
        """A conversation of two rounds can be encoded, and no id of it is the padding, which is dropped
        from texts.
        """
        try:
            ids, _ = self.encode(PROBE, pictures=True)
        except ConversationError as error:
            raise ConversationError(
                f"prompt version `chat` can't be used with this tokenizer: {error}"
            ) from None
        if ids.count(IMAGE_TOKEN_INDEX) != 1:
            raise ConversationError(
                f"prompt version `chat`: the tokenizer's chat template wrote {ids.count(IMAGE_TOKEN_INDEX)}"
                f" {IMAGE_TOKEN} for one; it must keep the text of a turn as it is"
            )
        if pad_id in ids:
            raise ConversationError(
                f"prompt version `chat`: the chat template writes {self._extended.pad_token!r}, which is the"
                " padding token, and padding is dropped from texts; set another pad_token in"
                " tokenizer_config.json"
            )


def _not_a_prefix(index: int, text: str, prompt: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), len(text))
    return (
        f"turn {index}: the tokenizer's chat template writes the beginning of the conversation otherwise once"
        f" it goes on (up to this answer {prompt[same : same + 40]!r}, in the whole"
        f" {text[same : same + 40]!r}), so no label would stand on what the model is asked for; use another"
        " template or another prompt version"
    )


_TEMPLATES: WeakKeyDictionary[Any, ChatTemplate] = WeakKeyDictionary()


def chat_of(tokenizer: Any) -> ChatTemplate:
    """The tokenizer's template, made ready once."""
    if tokenizer not in _TEMPLATES:
        _TEMPLATES[tokenizer] = ChatTemplate(tokenizer)
    return _TEMPLATES[tokenizer]
