"""What a guess would score in a task of lmms-eval, where its questions have something to guess among.

That is read from the questions themselves, as the task words them: letters that it lists with the right one
among them (`A. left`), or yes and no where nothing else is right in the whole task. The task's own metric
scores every option and has to call one of them right, so an option that it reads differently is not counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy
import pandas as pd

from workflow_scripts.evaluate.lmms.judging import Judge, Judged, summary
from workflow_scripts.evaluate.lmms.task import LoadedTask, right_answers
from workflow_scripts.evaluate.metrics import letter_of, normal_form
from workflow_scripts.io import UserError

GUESSES, MOST_DRAWS, SEED = 10_000, 20, 0
"""Metrics over all questions rest on about so many guesses: some tasks count for a minute at each draw."""
_LISTED = re.compile(r"^(?:\(([A-Za-z])\)|([A-Z])[.):])|(?<=\s)(?:\(([A-Za-z])\)|([A-Z])[.):])(?=\s)", re.M)
OPEN = "they list no options with the right one among them, and not only yes and no are right"


@dataclass(frozen=True)
class Chance:
    """What guesses score.

    Attributes:
        levels: by question, the mean score of its options; without the open ones.
        metrics: the task's own over all questions, the mean of ``draws``; empty where a question is open.
        reason: why something is missing.
    """

    levels: Mapping[str, float]
    metrics: Mapping[str, float]
    reason: str = ""

    @property
    def draws(self) -> int:
        """How often all questions are guessed."""
        return max(1, min(MOST_DRAWS, GUESSES // max(1, len(self.levels))))


def listed_letters(text: str) -> tuple[str, ...]:
    """The letters of the last list of options in a question: A, B, ... in order, at least two."""
    run: list[str] = []
    for found in _LISTED.finditer(text):
        letter = next(filter(None, found.groups())).upper()
        if letter == "A":
            run = [letter]
        elif run and ord(letter) == ord(run[-1]) + 1:
            run.append(letter)
    return tuple(run) if len(run) > 1 else ()


def yes_and_no(loaded: LoadedTask) -> tuple[str, ...]:
    """How the task writes yes and no; nothing where anything else is right too."""
    spelled: dict[str, str] = {}
    for document in loaded.documents:
        for answer in right_answers(loaded, document):
            if (form := normal_form(answer)) not in ("yes", "no"):
                return ()
            spelled.setdefault(form, answer)
    return tuple(spelled.values()) if len(spelled) > 1 else ()


def options_of(text: str, right: Sequence[str], otherwise: tuple[str, ...]) -> tuple[str, ...]:
    """What one would guess among: the listed letters if they have the right one, else ``otherwise``."""
    letters = listed_letters(text)
    return letters if len(right) == 1 and letter_of(right[0], ()) in letters else otherwise


def chance_of(judge: Judge, rows: pd.DataFrame) -> Chance:
    """Guesses at these questions.

    Args:
        rows: one a question, with `question`, `text` and `right`.
    """
    otherwise = yes_and_no(judge.loaded)
    asked = zip(rows["question"], rows["text"], rows["right"], strict=True)
    options = {name: options_of(text, list(right), otherwise) for name, text, right in asked}
    judged = _judged(judge, options)
    levels = {name: sum(item.score for item in items) / len(items) for name, items in judged.items()}
    if missing := len(options) - len(levels):
        return Chance(levels, {}, f"{missing} of {len(options)} questions are open: {OPEN}")
    found = Chance(levels, {})
    try:
        return replace(found, metrics=_guessed(judge.loaded, list(judged.values()), found.draws))
    except UserError as error:
        return replace(found, reason=str(error))


def _judged(judge: Judge, options: Mapping[str, Sequence[str]]) -> dict[str, list[Judged]]:
    """What the metrics say of each option, without the questions of which they call no option right."""
    flat = [(name, option) for name, found in options.items() for option in found]
    found = judge.judge([int(name) for name, _ in flat], [option for _, option in flat], "options")
    by_name: dict[str, list[Judged]] = {}
    for (name, _), item in zip(flat, found, strict=True):
        by_name.setdefault(name, []).append(item)
    return {name: items for name, items in by_name.items() if max(item.score for item in items) == 1}


def _guessed(loaded: LoadedTask, options: Sequence[Sequence[Judged]], number: int) -> dict[str, float]:
    random = numpy.random.default_rng(SEED)
    sizes = [len(items) for items in options]
    draws: list[dict[str, float]] = []
    for _ in range(number):
        chosen = random.integers(sizes)
        guesses = (items[place] for items, place in zip(options, chosen, strict=True))
        draws.append(summary(loaded, guesses))
    everywhere = [metric for metric in draws[0] if all(metric in found for found in draws)]
    return {metric: sum(found[metric] for found in draws) / number for metric in everywhere}
