"""Questions as LLaVA records: one question a record with its type, and one right answer of a few words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workflow_scripts.config.question_fields import FieldsSpec
from workflow_scripts.evaluate.tasks.stores import stored_pictures
from workflow_scripts.evaluate.tasks.task import Question, Task
from workflow_scripts.io import UserError, read_json


def read_questions(source: Path, fields: FieldsSpec | None = None) -> list[Question]:
    """The questions of a source's annotations. Raises UserError for unfit records."""
    manifest = read_json(source)
    questions: list[Question] = []
    for annotation in manifest["annotations"]:
        path = source.parent / annotation["path"]
        questions += [
            question_of(record, f"{path}, record {i}") for i, record in enumerate(read_json(path), 1)
        ]
    return questions


def question_of(record: dict[str, Any], where: str) -> Question:
    """A LLaVA record as a question; ``where`` names it in messages."""
    if found := _unfit(record):
        raise UserError(
            f"{where}: {found}; the evaluation needs records with image, question_type and exactly one"
            " question with its answer (a `shapes` source with `split: test`, or kind: table with `fields`)"
        )
    human, gpt = record["conversations"]
    text = human["value"].replace("<image>", "").strip()
    name = str(record.get("id", where.rpartition(" ")[2]))
    return Question(name, record["image"], record["question_type"], text, (gpt["value"],))


def _unfit(record: Any) -> str:
    """What keeps a record from being a question."""
    if not isinstance(record, dict):
        return f"no record but {record!r:.60}"
    if missing := [key for key in ("image", "question_type", "conversations") if key not in record]:
        return f"{missing[0]} is missing"
    turns = record["conversations"]
    if not isinstance(turns, list) or len(turns) != 2:
        return f"{len(turns) if isinstance(turns, list) else 'no'} turns"
    if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        return "a turn has no text as its `value`"
    if not isinstance(record["image"], str):
        return f"image is {record['image']!r:.60} and no name of one picture"
    if not isinstance(record["question_type"], str):
        return f"question_type is {record['question_type']!r:.60} and no text"
    return ""


SHAPES = Task("shapes", read_questions, stored_pictures)
