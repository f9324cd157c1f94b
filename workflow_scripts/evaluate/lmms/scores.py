"""Scores stored answers with the metrics of a task of lmms-eval.

    python -m workflow_scripts.evaluate.lmms.scores --spec JSON --source data/sources/S/manifest.json \\
        --predictions runs/predict/P/manifest.json --output runs/score/S/lmms_eval.json

Runs in the environment that has lmms-eval; needs no picture and no model. Writes the task's own metrics over
all answers of each condition, and beside it the score of each answer, from which intervals and tests are
made.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from llava_ext.files import atomic_path, sha256
from workflow_scripts.command_line import command_line, read_spec
from workflow_scripts.config.evaluation import TaskSpec
from workflow_scripts.evaluate.answers import TABLE
from workflow_scripts.evaluate.lmms.task import LoadedTask, answers_of, loaded_task, no_network
from workflow_scripts.io import UserError, progress, read_json, user_errors, write_json

KEYS = ["question", "condition", "seed"]
# What lmms-eval calls a metric that writes a file for somebody's server.
FOR_SERVERS = "submission"


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


def judged(loaded: LoadedTask, rows: pd.DataFrame) -> tuple[list[float], dict[str, float]]:
    """The score of each row of one condition and seed, and the task's metrics over all of them.

    Raises UserError for an answer to a question that the task does not have.
    """
    places = [int(name) for name in rows["question"]]
    if unknown := [place for place in places if not 0 <= place < len(loaded.documents)]:
        raise UserError(f"lmms.task: {loaded.spec.task} has no question {unknown[0]}; predict again")
    documents = [loaded.documents[place] for place in places]
    answers = answers_of(loaded.task, documents, list(rows["answer"]))
    # lmms-eval would try a metric that fails five times more.
    process = type(loaded.task).process_results.__wrapped__
    scores, values = [], defaultdict(list)
    pairs = zip(documents, answers, strict=True)
    for document, answer in progress(pairs, len(documents), f"scoring {loaded.spec.task}, answers"):
        found = process(loaded.task, document, [answer])
        scores.append(score_of(loaded, found))
        for metric, value in found.items():
            values[metric].append(value)
    return scores, _metrics(loaded, values)


def _metrics(loaded: LoadedTask, values: Mapping[str, Sequence[Any]]) -> dict[str, float]:
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


def score_answers(spec: TaskSpec, source: Path, predictions: Path, output: Path) -> dict[str, Any]:
    """Scores all rows and writes the scores, then the metrics."""
    assert spec.lmms is not None
    said = read_json(predictions)
    rows = pd.read_parquet(predictions.parent / said["folder"] / TABLE)
    parts: list[pd.DataFrame] = []
    metrics: dict[str, dict[str, Any]] = defaultdict(dict)
    with loaded_task(spec.lmms, source, output.parent) as loaded, no_network(f"lmms.task: {spec.lmms.task}"):
        about = loaded.about()
        if about != said["lmms_eval"]:
            raise UserError(f"{predictions}: asked with {said['lmms_eval']}, but this is {about}; ask again")
        for (condition, seed), part in rows.groupby(["condition", "seed"], sort=False):
            scores, found = judged(loaded, part)
            parts.append(part[KEYS].assign(score=scores))
            metrics[str(condition)][str(seed)] = found
    table = output.with_suffix(".parquet")
    with atomic_path(table) as temporary:
        pd.concat(parts).to_parquet(temporary, index=False)
    result = {
        "predictions": said["digest"],
        "lmms_eval": about,
        "metrics": metrics,
        "table": table.name,
        "digest": sha256(table),
    }
    write_json(output, result)
    return result


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Scores one checkpoint's answers to one task."""
    paths = {
        "source": "the manifest of the source with the task's files",
        "predictions": "the manifest of the predictions",
        "output": "the metrics, to be written",
    }
    texts = {"spec": "the task's section, as JSON"}
    options = command_line("evaluate.lmms.scores", __doc__, texts, paths).parse_args(argv)
    spec = read_spec(TaskSpec, options.spec)
    result = score_answers(spec, options.source, options.predictions, options.output)
    for condition, found in result["metrics"].items():
        print(f"{condition:<9} {found}", flush=True)


if __name__ == "__main__":
    main()
