"""Samples of a store as encoded examples for the collator."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from ..errors import NoVerdict, TrainingError
from .conversation import check_template, encode, require_pictures
from .templates import IGNORE_INDEX, ConversationError

if TYPE_CHECKING:
    from .assembly import Collator
    from .samples import SampleStore


class RecordError(TrainingError):
    """A record that no prompt can be made of. ``index``: the sample's."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


ImageReader = Callable[[bytes, bool], torch.Tensor]


class EncodedSamples(Dataset[dict[str, Any]]):
    """Each item: ``input_ids`` and ``labels`` (lists, -200 for an image), ``images`` (list of ``(3, S, S)``),
    ``index``.

    Args:
        store: records and image files.
        read_image: file content and tolerance to pixel values.
        cache_mib: how much of the encoded samples may stay in memory, per process. Nothing is random in an
            item, so a cached one is the same.

    Raises:
        TrainingError: a template that can't be used with this tokenizer.
    """

    def __init__(
        self,
        store: SampleStore,
        tokenizer: Any,
        version: str,
        max_length: int,
        read_image: ImageReader,
        cache_mib: int = 0,
    ) -> None:
        self.store = store
        self.tokenizer = tokenizer
        self.version = version
        self.max_length = max_length
        self.read_image = read_image
        self._room = cache_mib * 2**20
        self._cache: dict[int, dict[str, Any]] = {}
        try:
            check_template(version, tokenizer)
        except ConversationError as error:
            raise TrainingError(f"--version {version}: {error}") from None

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._cache.get(index)
        if item is None:
            item = self._item(index)
            size = 64 * len(item["input_ids"]) + sum(image.nbytes for image in item["images"])
            if size <= self._room:
                self._room -= size
                self._cache[index] = item
        return item

    def text(self, index: int) -> Any:
        """The sample's ids and labels without its images, as :func:`llava_ext.data.conversation.encode`
        gives them.
        """
        record = self.store.record(index)
        try:
            encoded = encode(record, self.tokenizer, self.version, self.max_length)
            require_pictures(record, encoded)
            return encoded
        except (ValueError, KeyError, AssertionError) as error:
            raise RecordError(f"{self.describe(index)}: can't be encoded: {error}", index) from error

    def _item(self, index: int) -> dict[str, Any]:
        encoded = self.text(index)
        return {
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "images": self._images(index),
            "index": index,
        }

    def _images(self, index: int) -> list[torch.Tensor]:
        try:
            files = self.store.image_bytes(index)
            return [
                self.read_image(data, tolerant)
                for data, tolerant in zip(files, self.store.tolerant(index), strict=True)
            ]
        except (OSError, ValueError) as error:
            kind = NoVerdict if _is_of_the_disk(error) else TrainingError
            raise kind(f"{self.describe(index)}: its image can't be used: {error}") from error

    def describe(self, index: int) -> str:
        """Names a sample in messages: its file, number (from 1), id, source and image."""
        record = self.store.record(index)
        image = record.get("image") or "no image"
        source = f"id {record.get('id')!r}, source {self.store.source(index)}"
        return f"{self.store.path}, record {index + 1} ({source}, {image})"


# What the files themselves are like: the next attempt finds the same.
OF_THE_FILE = frozenset([None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES])


def _is_of_the_disk(error: BaseException | None) -> bool:
    """Whether a file could not be read for a reason that may pass (a disk, a network, a file server)."""
    while error is not None:
        if isinstance(error, OSError) and error.errno not in OF_THE_FILE:
            return True
        error = error.__context__
    return False


class TrainingCollator:
    """A collator whose batches also say which samples they hold (``indices``), for messages, what they hold
    (``counts``), which of them could not be used (``failures``), where the placeholders are
    (``image_places``, ``image_offsets``, ``image_span``), and where the next token is a label
    (``predicting``, flat places, and ``targets``, both (labels,)).

    Counted and looked for here, in the dataset workers: on a GPU each number would cost a wait. Padding on
    the right needs no mask: attention is causal, so no token sees the padding behind it, and without a mask
    it is computed by the fastest kernels.
    """

    def __init__(self, collate: Collator) -> None:
        self.collate = collate

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = dict(self.collate(items))
        batch["indices"] = [item["index"] for item in items]
        batch["failures"] = [item["failure"] for item in items if "failure" in item]
        batch["counts"] = self._count(batch) | {"samples": sum("skipped" not in item for item in items)}
        batch |= self._places(batch)
        if self.collate.padding_side == "right":
            batch.pop("attention_mask", None)
        return batch

    def _places(self, batch: dict[str, Any]) -> dict[str, Any]:
        labels = batch["labels"]
        predicting = torch.nn.functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1)).flatten().nonzero()[:, 0]
        is_image = batch["input_ids"] == self.collate.image_token_id
        found = {
            "predicting": predicting,
            "targets": labels.flatten()[predicting + 1],
            "image_places": is_image.flatten().nonzero()[:, 0],
        }
        if "image_token_counts" in batch:
            counts = batch["image_token_counts"].tolist()
            offsets = torch.cat([torch.arange(count) for count in counts])
            columns = is_image.any(0).nonzero()[:, 0]
            span = int(columns[-1] - columns[0])
            found |= {"image_token_counts": counts, "image_offsets": offsets, "image_span": span}
        return found

    def _count(self, batch: dict[str, Any]) -> dict[str, int]:
        mask, ids = batch.get("attention_mask"), batch["input_ids"]
        lengths = _packed_lengths(batch["position_ids"]) if mask is None else mask.sum(1)
        tokens = int(lengths.sum())
        return {
            "tokens": tokens,
            "text": tokens - int((ids == self.collate.image_token_id).sum()),
            "supervised": int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()),
            "pairs": int((lengths * (lengths + 1) // 2).sum()),
            "images": len(batch.get("pixel_values", ())),
        }


def _packed_lengths(positions: torch.Tensor) -> torch.Tensor:
    """Tokens of each sample of a packed row, (samples,), from its positions (1, tokens)."""
    begins = (positions[0] == 0).nonzero()[:, 0]
    ends = torch.cat([begins[1:], begins.new_tensor([positions.shape[1]])])
    return ends - begins
