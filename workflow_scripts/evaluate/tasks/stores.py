"""Pictures that lie in a source's archive or folder, under the names that questions use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from workflow_scripts.config.question_fields import FieldsSpec
from workflow_scripts.evaluate.tasks.task import Pictures, Question
from workflow_scripts.io import UserError, read_json

# A picture of more bytes is no picture of an evaluation.
MOST_BYTES = 1 << 28


@contextmanager
def stored_pictures(
    source: Path, fields: FieldsSpec | None, questions: Sequence[Question]
) -> Iterator[Pictures]:
    """Reads pictures by their name in the questions; all of them are looked up before the first is read.

    A name may begin with folders that the archive does not have (`coco/train2017/1.jpg` for
    `train2017/1.jpg`).
    """
    from workflow_scripts.archives import DamagedMember, StoreReader, list_members

    images = read_json(source)["images"]
    if images is None:
        raise UserError(f"{source}: the source has no pictures; a task's source needs one with pictures")
    path, kind = source.parent / images["path"], images["type"]
    listing = list_members(path, kind)
    rows = {name: row for row, name in enumerate(listing.names)}
    places = _places(dict.fromkeys(item.image for item in questions), rows, path)
    with StoreReader(path, kind) as reader:

        def picture(name: str) -> bytes:
            try:
                return reader.read(listing, places[name], MOST_BYTES).data
            except DamagedMember as error:
                raise UserError(f"{path}: {name}: {error}; make the source again") from None

        yield picture


def _places(names: Iterable[str], rows: Mapping[str, int], path: Path) -> dict[str, int]:
    found = {name: _row(name, rows) for name in names}
    if absent := [name for name, row in found.items() if row is None]:
        raise UserError(
            f"{path}: {len(absent)} of {len(found)} pictures that are asked about are not there:"
            f" {_first(absent)}; there are: {_first(list(rows)) or 'none'}. Correct the names in the"
            " questions, or the source's `images`"
        )
    return {name: row for name, row in found.items() if row is not None}


def _first(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *["..."][: max(0, len(names) - 3)]])


def _row(name: str, rows: Mapping[str, int]) -> int | None:
    parts = name.split("/")
    return next((rows[end] for i in range(len(parts)) if (end := "/".join(parts[i:])) in rows), None)
