"""Which tasks a configuration asks which checkpoints, and how those runs are named.

A run of predictions is named by the export and by all that decides the answers; a run of scores by its
predictions and by all that decides how they are counted. So another metric counts the same answers again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow_scripts.config.evaluation import EvaluationSpec, TaskSpec
from workflow_scripts.config.experiments import Checkpoint
from workflow_scripts.config.schema import Config
from workflow_scripts.evaluate.harness import harness
from workflow_scripts.io import UserError, digest, read_json
from workflow_scripts.plan.questions import find_prepared
from workflow_scripts.plan.runs import Run
from workflow_scripts.plan.source_keys import known_recipe


@dataclass(frozen=True)
class Evaluation:
    """One task asked of one experiment's checkpoint."""

    experiment: str
    task: str
    predict: Run
    score: Run

    @property
    def named(self) -> str:
        """The scores under the experiment's name."""
        return f"experiments/{self.experiment}/evaluation/{self.task}.json"


def find_evaluations(
    config: Config, experiments: Mapping[str, Checkpoint], runs: Mapping[tuple[str, str], Run]
) -> dict[tuple[str, str], Evaluation]:
    """By (experiment, task), in the order of the configuration."""
    shared: dict[tuple[str, str], Run] = {}
    found = {}
    for experiment in experiments.values():
        for task in tasks_of(config, experiment):
            export = runs["export", experiment.name]
            predict, score = (
                shared.setdefault((stage, name), Run(stage, name, experiment.name, task))
                for stage, name in _names(config, export, task)
            )
            found[experiment.name, task] = Evaluation(experiment.name, task, predict, score)
    return found


def tasks_of(config: Config, experiment: Checkpoint) -> list[str]:
    """The tasks that an experiment is asked: its own choice, else the evaluation's, else all."""
    if config.evaluation is None:
        return []
    chosen = config.evaluation.default_tasks if experiment.tasks is None else experiment.tasks
    return [name for name in config.evaluation.tasks if chosen is None or name in chosen]


def _names(config: Config, export: Run, task: str) -> Iterator[tuple[str, str]]:
    assert config.evaluation is not None
    spec = config.evaluation.tasks[task]
    slug, _, exported = export.name.rpartition("-")
    asked = {
        "export": exported,
        "task": spec.asked(),
        "source": known_recipe(spec.source, config.sources[spec.source]),
        "harness": harness(),
    }
    if task in (prepared := find_prepared(config)):
        asked["questions"] = prepared[task].name
    key = digest({"stage": "predict", **asked}, 10)
    yield "predict", f"{slug}-{task}-{key}"
    counted = {"predict": key, "task": spec.scored(), "statistics": statistics_of(config.evaluation)}
    yield "score", f"{slug}-{task}-{digest({'stage': 'score', **counted}, 10)}"


def statistics_of(spec: EvaluationSpec) -> dict[str, Any]:
    """The settings of intervals and tests."""
    return {key: getattr(spec, key) for key in ("confidence", "resamples", "seed")}


def shard_files(run: Run, spec: TaskSpec) -> list[str]:
    """What says that the shards of a run of predictions are done; none where one job does it all.

    Finished predictions keep the number of shards that they were made with: another one changes nothing.
    """
    number = spec.shards
    noted = Path(run.folder) / "shards.json"
    if Path(run.manifest).is_file() and noted.is_file():
        with suppress(UserError, KeyError, TypeError, ValueError):
            number = int(read_json(noted)["shards"])
    return [f"{run.folder}/shard-{shard}-of-{number}.json" for shard in range(number)] if number > 1 else []
