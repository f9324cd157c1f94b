"""Compares a checkpoint with the baseline, question by question, on every task that both were asked.

    python -m workflow_scripts.evaluate.compare --spec JSON --scores S.json... --baseline S.json... \\
        --output experiments/E/comparison.json

Reads scores only. Each difference has a paired bootstrap interval clustered by picture, the p-value of
McNemar's exact test (of a permutation test where scores are shares), and the smallest difference that these
questions could show. p-values are adjusted by Holm: those of the tasks among the tasks, those of a task's
strata among its strata.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from workflow_scripts.command_line import command_line, read_spec
from workflow_scripts.config.base import StrictModel
from workflow_scripts.evaluate.questions import ALL
from workflow_scripts.evaluate.score import SCORES
from workflow_scripts.evaluate.statistics import Difference, Settings, difference, holm
from workflow_scripts.io import UserError, read_json, user_errors, write_json


class CompareSpec(StrictModel):
    """What the step has to know."""

    experiment: str
    """Whose checkpoint it is."""
    baseline: str
    """The experiment that it is compared with."""
    confidence: float = 0.95
    """Of the intervals; 1 minus it is the level of the tests."""
    resamples: int = 2000
    """Bootstrap samples."""
    seed: int = 0
    """Of the bootstrap."""


def read_scores(manifest: Path) -> pd.DataFrame:
    """The scores of the questions as they are."""
    rows = pd.read_parquet(manifest.with_name(SCORES))
    return rows[rows["condition"] == "normal"]


def differences(rows: pd.DataFrame, baseline: pd.DataFrame, settings: Settings) -> dict[str, Difference]:
    """By stratum, all questions first. Raises UserError where the questions are not the same."""
    mine, other = set(rows["question_digest"]), set(baseline["question_digest"])
    if mine != other:
        raise UserError(
            f"{max(len(mine - other), len(other - mine))} questions differ between the two, e.g. in text or"
            " right answer; a paired comparison needs the same: make the predictions again"
        )
    strata = list(dict.fromkeys(rows["stratum"]))
    found = {ALL: difference(rows, baseline, settings)}
    for name in strata if len(strata) > 1 else []:
        first, second = (part[part["stratum"] == name] for part in (rows, baseline))
        found[name] = difference(first, second, settings)
    return found


def _plain(found: Difference, adjusted: float, level: float) -> dict[str, Any]:
    numbers = {
        "value": found.estimate.value,
        "low": found.estimate.low,
        "high": found.estimate.high,
        "p": found.p,
        "p_holm": adjusted,
        "detectable": found.detectable or float("nan"),  # unknown where no question tells the two apart
    }
    plain: dict[str, Any] = {key: None if x != x else float(f"{x:.6g}") for key, x in numbers.items()}
    counts = {"questions": found.estimate.questions, "pictures": found.estimate.pictures}
    return plain | counts | {"significant": adjusted < level}


def compare(spec: CompareSpec, scores: Mapping[str, Path], baseline: Mapping[str, Path]) -> dict[str, Any]:
    """Differences by task and stratum. Both are manifests of scores by task."""
    settings, level = Settings(spec.confidence, spec.resamples, spec.seed), 1 - spec.confidence
    found = {
        task: differences(read_scores(path), read_scores(baseline[task]), settings)
        for task, path in scores.items()
        if task in baseline
    }
    whole = dict(zip(found, holm([parts[ALL].p for parts in found.values()]), strict=True))
    tasks = {}
    for task, parts in found.items():
        strata = [name for name in parts if name != ALL]
        adjusted = dict(zip(strata, holm([parts[name].p for name in strata]), strict=True)) | {
            ALL: whole[task]
        }
        tasks[task] = {name: _plain(item, adjusted[name], level) for name, item in parts.items()}
    return {**spec.model_dump(), "tasks": tasks}


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Compares one checkpoint with the baseline."""
    texts = {"spec": "experiment, baseline and the settings of the statistics, as JSON"}
    parser = command_line("evaluate.compare", __doc__, texts, {"output": "comparison.json, to be written"})
    for name in ("scores", "baseline"):
        parser.add_argument(f"--{name}", nargs="*", type=Path, required=True, help="manifests of scores")
    options = parser.parse_args(argv)
    by_task = [
        {read_json(path)["task"]: path for path in paths} for paths in (options.scores, options.baseline)
    ]
    write_json(options.output, compare(read_spec(CompareSpec, options.spec), *by_task))


if __name__ == "__main__":
    main()
