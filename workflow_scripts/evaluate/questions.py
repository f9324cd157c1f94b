"""The questions of a task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from workflow_scripts.config.evaluation import TaskSpec
from workflow_scripts.evaluate.metrics import why_never_right
from workflow_scripts.evaluate.tasks import TASKS
from workflow_scripts.evaluate.tasks.task import Question
from workflow_scripts.io import UserError

PICTURE = "<image>"
ALL = "all"
"""The stratum that is all questions."""


def read_questions(spec: TaskSpec, source: Path) -> list[Question]:
    """What the task asks, with distinct names. Raises UserError where there is nothing or something unfit."""
    questions = first_pictures(TASKS[spec.kind].read(source, spec.fields), spec.pictures)
    if not questions:
        raise UserError(f"{source}: the source has no questions of kind: {spec.kind}; name another source")
    if spec.expected_questions not in (None, len(questions)):
        raise UserError(
            f"expected_questions: {spec.expected_questions}, but {len(questions)} of {source} would be asked;"
            " correct the number or the source"
        )
    worded = [
        replace(item, text=f"{spec.prompt_prefix}{item.text}{spec.prompt_suffix}")
        for item in _with_distinct_names(questions)
    ]
    several = len({item.type for item in worded}) > 1
    for item in worded:
        if found := _unfit(item, spec.metric, several):
            raise UserError(f"{source}, question {item.name}: {found}")
    return worded


def _unfit(item: Question, metric: str, several: bool) -> str:
    """What keeps a question, one of several strata perhaps, from being asked and scored."""
    if PICTURE in item.text:
        return (
            f"{PICTURE} stands in {item.text!r:.80}; the checkpoint's template puts the picture before the"
            " question, so remove it there or from prompt_prefix and prompt_suffix"
        )
    try:
        "".join([item.name, item.image, item.type, item.text, *item.answers, *item.choices]).encode()
    except UnicodeEncodeError as error:
        return f"half a character ({error}), which no file can hold; correct the text"
    if several and item.type == ALL:
        return f"its stratum is called {ALL!r}, as all questions together are; call it otherwise"
    return why_never_right(metric, item.answers, item.choices)


def first_pictures(questions: Sequence[Question], number: int | None) -> list[Question]:
    """The questions about the first ``number`` pictures; all of them for None."""
    chosen = set(list(dict.fromkeys(question.image for question in questions))[:number])
    return [question for question in questions if question.image in chosen]


def _with_distinct_names(questions: Sequence[Question]) -> list[Question]:
    """LLaVA's ids name pictures, not questions: the second of a name becomes `name#2`."""
    seen: Counter[str] = Counter()
    found: dict[str, Question] = {}
    for item in questions:
        name = item.name
        while name in found:
            seen[item.name] += 1
            name = f"{item.name}#{seen[item.name] + 1}"
        found[name] = item if name == item.name else replace(item, name=name)
    return list(found.values())
