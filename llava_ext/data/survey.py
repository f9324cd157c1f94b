"""What training will see of each sample: its tokens and labels, pictures counted in, after the cut.

Nothing is computed a second way: a sample's ids and labels are those of
:meth:`llava_ext.data.dataset.EncodedSamples.text`, and its cut is that of
:meth:`llava_ext.data.assembly.Collator.assemble`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TrainingError
from .conversation import Encoded, encode
from .dataset import EncodedSamples
from .read_ahead import ReadAhead
from .samples import image_names
from .templates import IGNORE_INDEX, IMAGE_TOKEN_INDEX, template

if TYPE_CHECKING:
    from .assembly import Collator
    from .samples import SampleStore

# One row a sample and layout: tokens after the cut, those of them that are pictures', and labels; why there
# is no label (a place in REASONS); whether the sample was cut; its pictures, and those of which the cut took
# some or all tokens.
MEASURED = np.dtype(
    [
        ("tokens", "<i4"),
        ("vision", "<i4"),
        ("labels", "<i4"),
        ("reason", "u1"),
        ("is_cut", "?"),
        ("pictures", "u1"),
        ("pictures_cut", "u1"),
    ]
)

# Why a sample has no label, in words for people; the place in this table is what MEASURED holds.
REASONS: dict[str, str] = {
    "labelled": "it has labels",
    "mismatch": "the tokenizer does not fit the conversation template",
    "end_in_text": "its text holds what ends an answer",
    "cut_away": "everything with a label lies behind model_max_length",
    "no_answer": "no answer has a token",
    "refused": "it can't be encoded",
    "left_out": "skip_samples names it: one token takes its place",
}
CODES = {name: code for code, name in enumerate(REASONS)}
TOGETHER = 512  # records whose texts are tokenised at once
PICTURE = SimpleNamespace(ndim=3)
MOST_PICTURES = 255


@dataclass
class Measured:
    """Rows of MEASURED, (layouts, samples), and what was said against samples that can't be encoded."""

    rows: np.ndarray
    refused: dict[int, str] = field(default_factory=dict)


class Surveyor:
    """Measures samples for several layouts of an image's tokens at once: their text is the same.

    Args:
        tokenizer: as :func:`llava_ext.model.folders.load_tokenizer` gives it.
        collators: one a layout, each with a ``model_max_length`` of ``max_length``.
        skipped: samples that training leaves out.
    """

    def __init__(
        self,
        store: SampleStore,
        tokenizer: Any,
        version: str,
        max_length: int,
        collators: Sequence[Collator],
        skipped: Collection[int] = (),
    ) -> None:
        self.store, self.version, self.max_length = store, version, max_length
        self.collators, self.skipped = collators, frozenset(skipped)
        self._ahead = ReadAhead(tokenizer, version, max_length)
        self._samples = EncodedSamples(store, self._ahead.tokenizer, version, max_length, _no_image)
        self._end = template(version).separators[1] if template(version).style == "dialogue" else None

    def describe(self, index: int) -> str:
        """Names a sample: its file, number (from 1), id, source and image."""
        return self._samples.describe(index)

    def measure(self, indices: range) -> Measured:
        """Measures these samples."""
        found = Measured(np.zeros((len(self.collators), len(indices)), MEASURED))
        for place, index, encoded in self._encoded(indices, found.refused):
            column = found.rows[:, place]
            if index in self.skipped:
                column["tokens"], column["reason"] = 1, CODES["left_out"]
                continue
            if encoded is None:
                column["reason"] = CODES["refused"]
                continue
            for row, collator in zip(column, self.collators, strict=True):
                self._measure(row, index, encoded, collator)
        return found

    def _encoded(self, indices: range, refused: dict[int, str]) -> Iterator[tuple[int, int, Encoded | None]]:
        for start in range(0, len(indices), TOGETHER):
            group = indices[start : start + TOGETHER]
            self._ahead.look_at(self.store.record(index) for index in group)
            for place, index in enumerate(group, start):
                encoded = None
                try:
                    encoded = None if index in self.skipped else self._samples.text(index)
                except TrainingError as error:
                    refused[index] = str(error)
                yield place, index, encoded

    def _measure(self, row: Any, index: int, encoded: Encoded, collator: Collator) -> None:
        pictures = encoded.input_ids.count(IMAGE_TOKEN_INDEX)
        sample = {
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "images": [PICTURE] * pictures,
            "index": index,
        }
        seen = collator.assemble(sample)
        uncut = len(encoded.input_ids) - encoded.input_ids.count(collator.pad_token_id)
        uncut += pictures * (len(collator.block) - 1)
        whole = collator.block.count(collator.image_token_id)
        labels = _labels(seen.labels)
        row["tokens"], row["vision"], row["labels"] = len(seen.input_ids), sum(seen.counts), labels
        row["is_cut"] = len(seen.input_ids) < uncut or self._is_cut_before(index, encoded)
        row["pictures"] = min(pictures, MOST_PICTURES)
        row["pictures_cut"] = min(pictures - seen.counts.count(whole), MOST_PICTURES)
        row["reason"] = CODES["labelled" if labels else self._why(index, encoded, bool(row["is_cut"]))]

    def _is_cut_before(self, index: int, encoded: Encoded) -> bool:
        """Whether a text without picture was cut while it was encoded: with room for one more id it is
        longer.
        """
        record = self.store.record(index) if len(encoded.input_ids) == self.max_length else {}
        if not record or image_names(record.get("image")):
            return False
        more = encode(record, self._ahead.tokenizer, self.version, self.max_length + 1)
        return len(more.input_ids) > self.max_length

    def _why(self, index: int, encoded: Encoded, is_cut: bool) -> str:
        if encoded.mismatch:
            return "end_in_text" if self._holds_end(self.store.record(index)) else "mismatch"
        return "cut_away" if is_cut else "no_answer"

    def _holds_end(self, record: Mapping[str, Any]) -> bool:
        return self._end is not None and any(self._end in turn["value"] for turn in record["conversations"])


def _labels(labels: Sequence[int]) -> int:
    """Labels that training predicts: nothing predicts the first token."""
    predicted = labels[1:]
    return len(predicted) - predicted.count(IGNORE_INDEX)


def _no_image(data: bytes, tolerant: bool) -> Any:
    raise AssertionError("images are not read for a survey")
