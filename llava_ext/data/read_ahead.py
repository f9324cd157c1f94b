"""Texts tokenised many at a time for code that asks for one after the other.

:func:`llava_ext.data.conversation.encode` asks the tokenizer for the ids of several texts a sample, and which
texts these are depends on no id. So it is run once with a tokenizer that only writes down what it is asked
for, the texts are tokenised together, and then it is run again: the same function, which finds its answers
ready. A text that was not foreseen is tokenised when it is asked for, so nothing depends on the foresight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from .conversation import encode
from .templates import template

NOTHING = SimpleNamespace(ids=[])


class _Answers:
    """Stands in for a tokenizer; its backend gives the ids of whole texts."""

    truncation = padding = None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.backend_tokenizer = self
        self.ready: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode(self, text: str) -> Any:
        """What is ready, or the tokenizer's own answer."""
        found = self.ready.get(text)
        return self.tokenizer.backend_tokenizer.encode(text) if found is None else found


class _Questions(_Answers):
    """Writes down the texts that it is asked for."""

    def encode(self, text: str) -> Any:
        self.ready[text] = NOTHING
        return NOTHING


class ReadAhead:
    """A tokenizer with the texts of coming samples ready.

    Attributes:
        tokenizer: to be given to :func:`encode`; equal to the one that it was made from.
    """

    def __init__(self, tokenizer: Any, version: str, max_length: int) -> None:
        self.version, self.max_length = version, max_length
        self._real = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        # A chat template needs the places of the tokens too, and asks for its texts in one piece anyway.
        self._helps = (
            backend is not None
            and backend.truncation is None
            and backend.padding is None
            and template(version).style != "tokenizer"
        )
        self._answers, self._questions = _Answers(tokenizer), _Questions(tokenizer)
        self.tokenizer: Any = self._answers if self._helps else tokenizer

    def look_at(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Makes the texts of these records ready, and forgets all others."""
        if not self._helps:
            return
        self._questions.ready = {}
        for record in records:
            with suppress(ValueError, KeyError, AssertionError):  # who encodes the record will hear it
                encode(record, self._questions, self.version, self.max_length)
        texts = list(self._questions.ready)
        found = self._real.backend_tokenizer.encode_batch_fast(texts)
        self._answers.ready = dict(zip(texts, found, strict=True))
