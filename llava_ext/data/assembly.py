"""Encoded samples to model batches: LLaVA's sequence assembly, on token ids instead of embeddings.

Each -200 becomes the placeholders of its image, with interleaved coordinates where asked for; then the
sequence is cut, so an image can be cut too. The model puts the vision tokens into the placeholders.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..model.configuration_spatial_llava import SpatialLlavaConfig
from ..model.interventions import Interventions
from .templates import IGNORE_INDEX, IMAGE_TOKEN_INDEX


class AssemblyError(ValueError):
    """A sample whose placeholders and images do not fit together."""


def coordinate_ids(tokenizer: Any, row: int, column: int) -> list[int]:
    """Ids of the text `row,column` as it stands between vision tokens: without BOS and without a leading
    word mark.
    """
    text = f"{row},{column}"
    anchor = tokenizer.eos_token
    # After a special token no mark is added, so the ids that follow one are those of the bare text.
    ids: list[int] = tokenizer(anchor + text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[1:]


def published_coordinate_ids(tokenizer: Any, row: int, column: int) -> list[int]:
    """The published code's ids: the text tokenised on its own, first token dropped whatever it is."""
    ids: list[int] = tokenizer(f"{row},{column}", add_special_tokens=False, verbose=False)["input_ids"]
    return ids[1:]


def image_block(
    image_token_id: int,
    config: SpatialLlavaConfig,
    tokenizer: Any,
    interventions: Interventions | None = None,
) -> list[int]:
    """The ids that stand for one image: placeholders and, with ``interleave``, coordinates after every
    n-th.
    """
    chosen = config.interventions if interventions is None else interventions
    if not chosen.interleave:
        return [image_token_id] * config.tokens_per_image
    side = chosen.final_side(config.grid_side)
    to_ids = published_coordinate_ids if chosen.published_behaviour else coordinate_ids
    return interleaved_block(
        image_token_id,
        side * side,
        chosen.sparsity,
        lambda index: to_ids(tokenizer, *chosen.coordinates(index, side)),
    )


def interleaved_block(image_token_id: int, tokens: int, sparsity: int, coordinates: Any) -> list[int]:
    """``tokens`` placeholders with ``coordinates(index)`` after placeholder index = sparsity - 1, 2 *
    sparsity - 1, ...
    """
    block: list[int] = []
    for index in range(tokens):
        block.append(image_token_id)
        if (index + 1) % sparsity == 0:
            block.extend(coordinates(index))
    return block


@dataclass(frozen=True)
class Sequenced:
    """One assembled sample: ids and labels of equal length, pixel values of its images, placeholders kept
    of each.
    """

    input_ids: list[int]
    labels: list[int]
    images: list[Tensor] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


@dataclass
class Collator:
    """Encoded samples to a batch.

    A sample is a mapping with ``input_ids`` and ``labels`` (sequences of ints, -200 for an image) and
    ``images``: a list with, for each -200 in order, pixel values (3, S, S) or the crops of one picture
    (crops, 3, S, S). Images beyond the last -200 are ignored, as LLaVA ignores the picture of a sample that
    does not mention it.

    Attributes:
        image_token_id: the placeholder's id in the batch.
        block: the ids that stand for one image (see :func:`image_block`).
        pad_token_id: fills up rows; where it occurs inside a text it is dropped, as in LLaVA.
        model_max_length: rows are cut to this many ids after images are expanded. None: never.
        text_max_length: and to this many before, each image counting one; None: as model_max_length.
        padding_side: `right` or `left`.
        packed: one row of all samples without padding, each attending to itself only.
    """

    image_token_id: int
    block: Sequence[int]
    pad_token_id: int
    model_max_length: int | None = None
    text_max_length: int | None = None
    padding_side: str = "right"
    packed: bool = False

    @classmethod
    def for_model(cls, config: SpatialLlavaConfig, tokenizer: Any, **options: Any) -> Collator:
        """The collator that fits a model's configuration; ``options`` are further attributes."""
        return cls(
            image_token_id=config.image_token_id,
            block=image_block(config.image_token_id, config, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch: `input_ids`, `labels` (batch, tokens), `attention_mask` or, packed, `position_ids` of
        the same shape and where each sample begins (see :func:`segments`); and, if
        there are images, `pixel_values` (images, 3, S, S) and `image_token_counts` (images,).
        """
        rows = [self.assemble(sample) for sample in samples]
        batch = self._packed(rows) if self.packed else self._padded(rows)
        images = [image for row in rows for image in row.images]
        if images:
            batch["pixel_values"] = torch.stack(images)
            batch["image_token_counts"] = torch.tensor([count for row in rows for count in row.counts])
        return batch

    def assemble(self, sample: Mapping[str, Any]) -> Sequenced:
        """One sample, expanded and cut."""
        limit = self.text_max_length or self.model_max_length
        ids, labels = (_ints(sample[key])[:limit] for key in ("input_ids", "labels"))
        images = list(sample.get("images") or [])
        placeholders = ids.count(IMAGE_TOKEN_INDEX)
        if placeholders > len(images):
            raise AssemblyError(
                f"sample {sample.get('id', sample.get('index', 'without an id'))!r}: {placeholders} image"
                f" placeholders but {len(images)} images; each <image> needs one (a caption that contains the"
                " word <image> is a frequent cause)"
            )
        return self._expanded(ids, labels, images[:placeholders])

    def _expanded(self, ids: list[int], labels: list[int], images: list[Tensor]) -> Sequenced:
        """Drops pad ids, puts each image's ids in the place of its -200, then cuts."""
        new_ids: list[int] = []
        new_labels: list[int] = []
        spans: list[tuple[int, Tensor]] = []  # where each crop begins
        waiting = iter(images)
        for token, label in zip(ids, labels, strict=True):
            if token == self.pad_token_id:
                continue
            if token != IMAGE_TOKEN_INDEX:
                new_ids.append(token)
                new_labels.append(label)
                continue
            image = next(waiting)
            for crop in image if image.ndim == 4 else [image]:
                spans.append((len(new_ids), crop))
                new_ids.extend(self.block)
                new_labels.extend([IGNORE_INDEX] * len(self.block))
        limit = self.model_max_length
        new_ids, new_labels = new_ids[:limit], new_labels[:limit]
        kept = [
            (crop, new_ids[start : start + len(self.block)].count(self.image_token_id))
            for start, crop in spans
        ]
        kept = [(crop, count) for crop, count in kept if count]
        return Sequenced(new_ids, new_labels, [crop for crop, _ in kept], [count for _, count in kept])

    def _padded(self, rows: Sequence[Sequenced]) -> dict[str, Tensor]:
        width = max(len(row.input_ids) for row in rows)
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        labels = torch.full((len(rows), width), IGNORE_INDEX)
        mask = torch.zeros((len(rows), width), dtype=torch.bool)
        for index, row in enumerate(rows):
            length = len(row.input_ids)
            place = slice(width - length, width) if self.padding_side == "left" else slice(0, length)
            input_ids[index, place] = torch.tensor(row.input_ids, dtype=torch.long)
            labels[index, place] = torch.tensor(row.labels, dtype=torch.long)
            mask[index, place] = True
        return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}

    def _packed(self, rows: Sequence[Sequenced]) -> dict[str, Any]:
        """One row; positions restart with each sample, and a sample's first token is predicted by nobody."""
        ids = [token for row in rows for token in row.input_ids]
        labels = [label for row in rows for label in [IGNORE_INDEX, *row.labels[1:]][: len(row.labels)]]
        lengths = [len(row.input_ids) for row in rows if row.input_ids]
        positions = [position for length in lengths for position in range(length)]
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return {
            **segments(starts, max(lengths)),
            "input_ids": torch.tensor([ids], dtype=torch.long),
            "labels": torch.tensor([labels], dtype=torch.long),
            "position_ids": torch.tensor([positions], dtype=torch.long),
        }


def segments(starts: Tensor, longest: int) -> dict[str, Any]:
    """Where each sample of a packed row begins and the row ends, (samples + 1,), int32, and the tokens of the
    longest, under the names by which transformers hands them to its attention.
    """
    ends = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    return {**ends, "max_length_q": longest, "max_length_k": longest}


def _ints(values: Any) -> list[int]:
    """A list of ints from a tensor, an array or a list."""
    return values.tolist() if hasattr(values, "tolist") else list(values)
