"""The demo's questions about drawn shapes: one question a record with its type, and one right answer of a
few words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow_scripts.evaluate.tasks.task import Question, Task
from workflow_scripts.io import UserError, read_json


def read_questions(source: Path) -> list[Question]:
    """The questions of a source's annotations. Raises UserError for unfit records."""
    manifest = read_json(source)
    questions: list[Question] = []
    for annotation in manifest["annotations"]:
        path = source.parent / annotation["path"]
        questions += [_question(record, f"{path}, record {i}") for i, record in enumerate(read_json(path), 1)]
    if not questions:
        raise UserError(
            f"{source}: the source has no questions; evaluation.source needs one with `split: test`"
        )
    return questions


def _question(record: dict[str, Any], where: str) -> Question:
    missing = [key for key in ("image", "question_type", "conversations") if key not in record]
    if missing or len(record["conversations"]) != 2:
        found = f"{missing[0]} is missing" if missing else f"{len(record['conversations'])} turns"
        raise UserError(
            f"{where}: {found}; the evaluation needs records with image, question_type and exactly one"
            " question with its answer (evaluation.source: a `shapes` source with `split: test`)"
        )
    human, gpt = record["conversations"]
    text = human["value"].replace("<image>", "").strip()
    return Question(
        str(record.get("id", where)), record["image"], record["question_type"], text, gpt["value"]
    )


def normal_form(answer: str) -> str:
    """Answers are compared without case, surrounding blanks and a final full stop."""
    return " ".join(answer.lower().split()).removesuffix(".")


def is_right(given: str, right: str) -> bool:
    """Whether the words are the same."""
    return normal_form(given) == normal_form(right)


def chance_levels(questions: Sequence[Question]) -> dict[str, float]:
    """By question type: one over the number of different right answers."""
    found: dict[str, set[str]] = {}
    for question in questions:
        found.setdefault(question.type, set()).add(normal_form(question.answer))
    return {kind: round(1 / len(answers), 4) for kind, answers in found.items()}


SHAPES = Task("shapes", read_questions, is_right, chance_levels)
