"""Questions of one's own: JSON, JSON lines, CSV or parquet, with the columns that the configuration names.

Parquet may hold the pictures themselves, as files of the Hugging Face hub do: bytes, or a struct with
`bytes`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workflow_scripts.config.question_fields import FieldsSpec
from workflow_scripts.evaluate.metrics import letter_of, normal_form
from workflow_scripts.evaluate.tasks.stores import stored_pictures
from workflow_scripts.evaluate.tasks.task import Pictures, Question, Task
from workflow_scripts.io import UserError, digest, read_json

Record = Mapping[str, Any]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not in UTF-8 ({error}); save it so") from None


def _json(path: Path) -> Iterator[Record]:
    try:
        found = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error}); correct it") from None
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        raise UserError(
            f"{path}: no list of records; write [{{...}}, ...] or one record a line in a .jsonl file"
        )
    yield from found


def _json_lines(path: Path) -> Iterator[Record]:
    # Not splitlines: texts may hold other characters that end a line.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: no JSON object ({error}); correct it") from None
        if not isinstance(found, dict):
            raise UserError(f"{path}, line {number}: no JSON object but {line.strip()!r:.60}; correct it")
        yield found


def _csv(path: Path) -> Iterator[Record]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        if twice := [name for name, number in Counter(reader.fieldnames or ()).items() if number > 1]:
            raise UserError(f"{path}: has more than one column {twice[0]!r}; rename or remove one")
        for record in reader:
            if None in record:
                raise UserError(
                    f"{path}, line {reader.line_num}: more cells than columns; put texts with commas"
                    " in quotes"
                )
            yield record
    except csv.Error as error:
        raise UserError(f"{path}, after line {reader.line_num}: {error}; correct the quotes") from None


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=512):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: can't be read as parquet ({error}); fetch or write it again") from None


READERS: Mapping[str, Callable[[Path], Iterator[Record]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}


def records_of(source: Path) -> Iterator[tuple[str, Record]]:
    """The records of a source's annotation files, each with the words that name it in messages."""
    for annotation in read_json(source)["annotations"]:
        path = source.parent / annotation["path"]
        if path.suffix not in READERS:
            raise UserError(f"{path}: kind: table reads {', '.join(READERS)}; convert the file or rename it")
        for number, record in enumerate(READERS[path.suffix](path), 1):
            yield f"{path}, record {number}", record


def read_table(source: Path, fields: FieldsSpec | None) -> list[Question]:
    """The questions of a source's annotation files. Raises UserError for unfit records."""
    columns = fields or FieldsSpec()
    return [
        _question(record, columns, str(number), where)
        for number, (where, record) in enumerate(records_of(source), 1)
    ]


def _question(record: Record, columns: FieldsSpec, number: str, where: str) -> Question:
    def cell(key: str) -> Any:
        column = getattr(columns, key)
        if _is_nothing(record.get(column)):
            raise UserError(
                f"{where}: no {column!r}, which fields.{key} names; columns: {', '.join(map(str, record))}"
            )
        return record[column]

    name = _plain(cell("name")) if columns.name else number
    choices = _choices(cell("choices"), where) if columns.choices else ()
    answers = _answers(cell("answer") if columns.answer else 0, choices, where)
    answers = tuple(columns.answer_words.get(answer, answer) for answer in answers)
    if columns.shuffle_choices:
        choices, answers = _shuffled(choices, answers, name)
    text = str(cell("question")).replace("<image>", "").strip() if columns.question else ""
    text += "".join(f"\n{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False))
    return Question(
        name=name,
        image=_picture_name(cell("picture"), where),
        type=_plain(cell("stratum")) if columns.stratum else "all",
        text=text,
        answers=answers,
        choices=choices,
    )


_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _is_nothing(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_nothing, value))
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _plain(value: Any) -> str:
    """As text; a whole number as one, though a column with gaps holds it with a point."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _listed(value: Any) -> list[Any]:
    """A list; also one that CSV holds as JSON text, or texts by their letters."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    if isinstance(value, Mapping) and list(value) == list(_LETTERS[: len(value)]):
        return [text for text in value.values() if not _is_nothing(text)]
    return list(value) if isinstance(value, list | tuple) else [value]


def _choices(value: Any, where: str) -> tuple[str, ...]:
    found = tuple(map(str, _listed(value)))
    if not 2 <= len(found) <= len(_LETTERS):
        raise UserError(
            f"{where}: {len(found)} choices ({value!r:.60}), from 2 to {len(_LETTERS)} can be asked; write"
            ' a list, in CSV as JSON: ["left", "right"]'
        )
    return found


def _answers(value: Any, choices: Sequence[str], where: str) -> tuple[str, ...]:
    """The right answers as text; a number is the place of a choice, from 0."""
    place = _whole(value, choices)
    if place is not None and choices:
        if not 0 <= place < len(choices):
            raise UserError(f"{where}: the answer {place} is no place among {len(choices)} choices, from 0")
        return (_LETTERS[place],)
    value = place if place is not None and not isinstance(value, str) else value
    found = [item.get("answer") if isinstance(item, Mapping) else item for item in _listed(value)]
    if None in found:
        raise UserError(
            f"{where}: the answer {value!r:.80} is no text and no list of texts or {{answer: TEXT}}"
        )
    return tuple(str(item) for item in found)


def _whole(value: Any, choices: Sequence[str]) -> int | None:
    """A whole number; also with a point, as tables with gaps hold it, and in digits that are no choice."""
    if isinstance(value, str):
        return int(value) if value.strip().isdecimal() and value.strip() not in choices else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if value == int(value) else None


def _shuffled(
    choices: Sequence[str], answers: Sequence[str], name: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The choices in an order that the question's name decides, and the answers' letters there."""
    order = sorted(range(len(choices)), key=lambda place: digest([name, place]))
    letters = {_LETTERS[place]: _LETTERS[order.index(place)] for place in range(len(choices))}
    texts = {normal_form(choice) for choice in choices}
    moved = (a if normal_form(a) in texts else letters.get(letter_of(a, ()) or "", a) for a in answers)
    return tuple(choices[place] for place in order), tuple(moved)


def _picture_bytes(value: Any) -> bytes | None:
    """The picture that a cell holds itself; None where it holds a name."""
    value = value[0] if isinstance(value, list) and value else value
    found = value.get("bytes") if isinstance(value, Mapping) else value
    return bytes(found) if isinstance(found, bytes | bytearray) else None


def _picture_name(value: Any, where: str) -> str:
    """What a picture is called: its name, or its content's digest where the table holds it."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(value, list):
        raise UserError(f"{where}: asks about {len(value)} pictures; questions about one can be asked")
    data = _picture_bytes(value)
    if data is not None:
        return hashlib.sha256(data).hexdigest()[:16]
    name = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(name, str):
        raise UserError(
            f"{where}: fields.picture names {value!r:.60}, which is no picture and no name of one"
        )
    return name


@contextmanager
def table_pictures(
    source: Path, fields: FieldsSpec | None, questions: Sequence[Question]
) -> Iterator[Pictures]:
    """From the source's archive where it has one, else from the table itself."""
    if read_json(source)["images"] is not None:
        with stored_pictures(source, fields, questions) as picture:
            yield picture
        return
    column, wanted = (fields or FieldsSpec()).picture, {item.image for item in questions}
    found: dict[str, bytes] = {}
    for where, record in records_of(source):
        data = _picture_bytes(record.get(column))
        if data is not None and (name := _picture_name(record[column], where)) in wanted:
            found[name] = data
    if absent := sorted(wanted - found.keys()):
        raise UserError(
            f"{source}: the table holds no picture {absent[0]} itself (nor {len(absent) - 1} others); name an"
            " archive or a folder with them as the source's `images`"
        )
    yield found.__getitem__


TABLE = Task("table", read_table, table_pictures, takes_fields=True)
