"""The questions of a task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from workflow_scripts.config.evaluation import TaskSpec
from workflow_scripts.evaluate.tasks import TASKS
from workflow_scripts.evaluate.tasks.task import Question
from workflow_scripts.io import UserError


def read_questions(spec: TaskSpec, source: Path) -> list[Question]:
    """What the task asks, with distinct names. Raises UserError where there is nothing or something unfit."""
    questions = first_pictures(TASKS[spec.kind].read(source, spec.fields), spec.pictures)
    if not questions:
        raise UserError(f"{source}: the source has no questions of kind: {spec.kind}; name another source")
    return [
        replace(item, text=f"{spec.prompt_prefix}{item.text}{spec.prompt_suffix}")
        for item in _with_distinct_names(questions)
    ]


def first_pictures(questions: Sequence[Question], number: int | None) -> list[Question]:
    """The questions about the first ``number`` pictures; all of them for None."""
    chosen = set(list(dict.fromkeys(question.image for question in questions))[:number])
    return [question for question in questions if question.image in chosen]


def _with_distinct_names(questions: Sequence[Question]) -> list[Question]:
    """LLaVA's ids name pictures, not questions: the second of a name becomes `name#2`."""
    seen: Counter[str] = Counter()
    found = []
    for item in questions:
        seen[item.name] += 1
        found.append(item if seen[item.name] == 1 else replace(item, name=f"{item.name}#{seen[item.name]}"))
    return found
