"""Scores stored answers with the metrics of a task of lmms-eval.

    python -m workflow_scripts.evaluate.lmms.scores --spec JSON --source data/sources/S/manifest.json \\
        --predictions runs/predict/P/manifest.json --output runs/score/S/lmms_eval.json

Runs in the environment that has lmms-eval; needs no picture and no model. Writes the task's own metrics over
all answers of each condition, and beside it the score of each answer, from which intervals and tests are
made, and what a guess would score.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from llava_ext.files import atomic_path, sha256
from workflow_scripts.command_line import command_line, read_spec
from workflow_scripts.config.evaluation import TaskSpec
from workflow_scripts.evaluate.answers import TABLE
from workflow_scripts.evaluate.lmms.chance import chance_of
from workflow_scripts.evaluate.lmms.judging import Judge, summary
from workflow_scripts.evaluate.lmms.task import loaded_task, no_network
from workflow_scripts.io import UserError, read_json, user_errors, write_json

KEYS = ["question", "condition", "seed"]


def score_answers(spec: TaskSpec, source: Path, predictions: Path, output: Path) -> dict[str, Any]:
    """Scores all rows and writes the scores and chance levels, then the metrics."""
    assert spec.lmms is not None
    said = read_json(predictions)
    rows = pd.read_parquet(predictions.parent / said["folder"] / TABLE)
    parts: list[pd.DataFrame] = []
    metrics: dict[str, dict[str, Any]] = defaultdict(dict)
    with loaded_task(spec.lmms, source, output.parent) as loaded, no_network(f"lmms.task: {spec.lmms.task}"):
        about = loaded.about()
        if about != said["lmms_eval"]:
            raise UserError(f"{predictions}: asked with {said['lmms_eval']}, but this is {about}; ask again")
        judge = Judge(loaded)
        chance = chance_of(judge, rows[rows["condition"] == "normal"])
        for (condition, seed), part in rows.groupby(["condition", "seed"], sort=False):
            found = judge.judge([int(name) for name in part["question"]], list(part["answer"]), "answers")
            scores = [item.score for item in found]
            parts.append(part[KEYS].assign(score=scores, chance=part["question"].map(chance.levels)))
            metrics[str(condition)][str(seed)] = summary(loaded, found)
    table = output.with_suffix(".parquet")
    with atomic_path(table) as temporary:
        pd.concat(parts).to_parquet(temporary, index=False)
    result = {
        "predictions": said["digest"],
        "lmms_eval": about,
        "metrics": metrics,
        "chance": {"metrics": chance.metrics, "draws": chance.draws, "reason": chance.reason},
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
