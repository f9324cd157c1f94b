"""What a task's own metrics say of answers: the score of each, and its numbers over many."""

from __future__ import annotations

import inspect
import math
import numbers
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from workflow_scripts.evaluate.lmms.task import LoadedTask, answers_of
from workflow_scripts.io import UserError, progress

# What lmms-eval calls a metric that writes a file for somebody's server.
FOR_SERVERS = "submission"


class Judged(NamedTuple):
    """One answer: its score, from 0 to 1, and what each metric notes of it."""

    score: float
    noted: Mapping[str, Any]


def aggregated(loaded: LoadedTask, metric: str, values: Sequence[Any]) -> Any:
    """The task's own summary of the values of some answers."""
    function = loaded.task.aggregation()[metric]
    takes_arguments = "args" in inspect.signature(function).parameters
    return function(list(values), args=loaded.task.args) if takes_arguments else function(list(values))


def score_of(loaded: LoadedTask, found: Mapping[str, Any]) -> float:
    """The score of one answer, from 0 to 1, given what the task's metrics say of it.

    That is a number, a `score` among other things, or else the summary of this answer alone.
    """
    spec = loaded.spec
    metric = spec.metric or next(iter(found))
    if metric not in found:
        raise UserError(f"lmms.metric: {spec.task} has no metric {metric!r}; it has: {', '.join(found)}")
    value = found[metric]
    if isinstance(value, Mapping) and isinstance(value.get("score"), numbers.Real):
        value = value["score"]
    elif not isinstance(value, numbers.Real):
        value = aggregated(loaded, metric, [value])
    score = float(value) if isinstance(value, numbers.Real) else math.nan
    if not 0 <= score / spec.full_score <= 1:
        raise UserError(
            f"lmms: {metric} of {spec.task} scores an answer {score:g}, not from 0 to {spec.full_score:g};"
            " name another metric with lmms.metric, or say lmms.full_score"
        )
    return score / spec.full_score


class Judge:
    """Scores answers to the questions of a task."""

    def __init__(self, loaded: LoadedTask) -> None:
        self.loaded = loaded
        self._scores: dict[tuple[int, str], float] = {}

    def judge(self, places: Sequence[int], answers: Sequence[str], what: str) -> list[Judged]:
        """Each answer to the question at its place; ``what`` they are stands in the progress.

        Raises:
            UserError: the task has no such question, or a score is outside its scale.
        """
        task, number = self.loaded.task, len(self.loaded.documents)
        if unknown := [place for place in places if not 0 <= place < number]:
            raise UserError(f"lmms.task: {self.loaded.spec.task} has no question {unknown[0]}; predict again")
        documents = [self.loaded.documents[place] for place in places]
        read = answers_of(task, documents, answers)
        # lmms-eval would try a metric that fails five times more.
        process = type(task).process_results.__wrapped__
        found = []
        triples = zip(places, documents, read, strict=True)
        for place, document, answer in progress(
            triples, len(places), f"scoring {self.loaded.spec.task}, {what}"
        ):
            noted = process(task, document, [answer])
            found.append(Judged(self._score(place, answer, noted), noted))
        return found

    def _score(self, place: int, answer: Any, noted: Mapping[str, Any]) -> float:
        """Once for the same answer to the same question: some metrics take their time for each."""
        key = place, repr(answer)
        if key not in self._scores:
            self._scores[key] = score_of(self.loaded, noted)
        return self._scores[key]


def summary(loaded: LoadedTask, given: Iterable[Judged]) -> dict[str, float]:
    """The task's metrics over all these answers.

    Raises:
        UserError: a metric needs other questions beside these.
    """
    values: dict[str, list[Any]] = defaultdict(list)
    for item in given:
        for metric, noted in item.noted.items():
            values[metric].append(noted)
    found = {}
    for metric in loaded.task.aggregation():
        if metric == FOR_SERVERS or metric not in values:
            continue
        try:
            value = aggregated(loaded, metric, values[metric])
        except Exception as error:
            raise UserError(
                f"lmms: {metric} of {loaded.spec.task} can't be computed over {len(values[metric])} answers"
                f" ({type(error).__name__}: {error}); ask all questions (remove `pictures` from the task)"
            ) from error
        if isinstance(value, numbers.Real) and math.isfinite(value):
            found[metric] = float(value)
    return found
