"""Records that a training leaves out, and those that fail in it.

Either leaves a stand-in in its place: one token without a label and without a picture. Micro-batches keep
their rows, losses and gradients are those of the samples beside it, and every other sample keeps its place in
the order, in this epoch and the next.
"""

from __future__ import annotations

import traceback
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from torch.utils.data import Dataset

from ..errors import NoVerdict, TrainingError
from .templates import IGNORE_INDEX

if TYPE_CHECKING:
    from .dataset import EncodedSamples
    from .samples import SampleStore

EXAMPLES = 5


class _Identified(msgspec.Struct):
    id: str | int | float | None = None


_id_decoder = msgspec.json.Decoder(_Identified)


def find_records(store: SampleStore, wanted: str) -> list[int]:
    """The indices of records that are named by their ids or, as `#12`, by their numbers (from 1), with commas
    between.

    Raises:
        TrainingError: there is no such record, or several have the id.
    """
    names = list(dict.fromkeys(name.strip() for name in wanted.split(",") if name.strip()))
    numbers = {name: int(name[1:]) for name in names if name[:1] == "#" and name[1:].isdecimal()}
    for name, number in numbers.items():
        if not 1 <= number <= len(store):
            raise TrainingError(
                f"--skip_samples {name}: {store.path} has the records #1 to #{len(store)}; correct it or take"
                " it out"
            )
    found = [number - 1 for number in numbers.values()]
    found += _find_ids(store, [name for name in names if name not in numbers])
    return sorted(set(found))


def _find_ids(store: SampleStore, ids: Sequence[str]) -> list[int]:
    """One index an id. Reads all records when there is an id to look for."""
    places: dict[str, list[int]] = {name: [] for name in ids}
    for index in range(len(store)) if ids else ():
        place = places.get(str(_id_decoder.decode(store.record_bytes(index)).id))
        if place is not None:
            place.append(index)
    for name, indices in places.items():
        if not indices:
            raise TrainingError(
                f"--skip_samples {name}: no record of {store.path} has this id; correct it, give the number"
                " (#12), or take it out"
            )
        if len(indices) > 1:
            raise TrainingError(
                f"--skip_samples {name}: {len(indices)} records of {store.path} have this id:"
                f" {numbered(indices)}; give the numbers of those to leave out"
            )
    return [indices[0] for indices in places.values()]


def numbered(indices: Iterable[int]) -> str:
    """Records by their numbers, as `--skip_samples` takes them, a few of many."""
    names = [f"#{index + 1}" for index in indices]
    return ",".join(names[:100]) + (f" and {len(names) - 100} more" if len(names) > 100 else "")


def identified(store: SampleStore, indices: Iterable[int]) -> list[dict[str, Any]]:
    """What is recorded of records that are left out: number, id and source."""
    return [
        {
            "record": index + 1,
            "id": _id_decoder.decode(store.record_bytes(index)).id,
            "source": store.source(index),
        }
        for index in indices
    ]


@dataclass(frozen=True)
class Failure:
    """A sample that can't be used. ``repeats``: so it will be in the next attempt."""

    index: int
    reason: str
    repeats: bool


class GuardedSamples(Dataset[dict[str, Any]]):
    """The samples, with stand-ins (``skipped``) for those that are left out, and for those that fail
    (``failure``), which so reach the trainer in their turn, whichever process met them.
    """

    def __init__(self, samples: EncodedSamples, skipped: Collection[int] = ()) -> None:
        self.samples = samples
        self.skipped = frozenset(skipped)
        tokenizer = samples.tokenizer
        # No padding token: that is dropped from texts, and a row needs one.
        self.token = next(
            token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if token is not None
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.skipped:
            return self._stand_in(index)
        try:
            return self.samples[index]
        except Exception as error:  # noqa: BLE001 - whatever it is, the record has to be named
            return self._stand_in(index) | {"failure": self._failure(index, error)}

    def advice(self, failed: Iterable[int]) -> str:
        """How to go on when these samples can't be used."""
        return (
            "Mend what is wrong, or leave out what can't be used:"
            f' --skip_samples "{numbered(sorted({*self.skipped, *failed}))}"'
        )

    def _stand_in(self, index: int) -> dict[str, Any]:
        return {
            "input_ids": [self.token],
            "labels": [IGNORE_INDEX],
            "images": [],
            "index": index,
            "skipped": True,
        }

    def _failure(self, index: int, error: Exception) -> Failure:
        repeats = not isinstance(error, (NoVerdict, MemoryError))
        if isinstance(error, TrainingError):
            return Failure(index, str(error), repeats)
        traceback.print_exc()
        return Failure(index, f"{self._name(index)}: {type(error).__name__}: {error}", repeats)

    def _name(self, index: int) -> str:
        try:
            return self.samples.describe(index)
        except (OSError, ValueError):  # not even its record can be read
            return f"{self.samples.store.path}, record {index + 1}"
