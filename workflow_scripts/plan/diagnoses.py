"""Which checkpoints are looked into with which task's questions, and how those runs are named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from workflow_scripts.config.experiments import Checkpoint
from workflow_scripts.config.schema import Config
from workflow_scripts.diagnose.content import content_of
from workflow_scripts.io import digest
from workflow_scripts.plan.evaluations import tasks_of
from workflow_scripts.plan.runs import Run
from workflow_scripts.plan.source_keys import known_recipe


@dataclass(frozen=True)
class Diagnosis:
    """One experiment's checkpoint, looked into with one task's questions."""

    experiment: str
    task: str
    run: Run


def find_diagnoses(
    config: Config, experiments: Mapping[str, Checkpoint], runs: Mapping[tuple[str, str], Run]
) -> dict[tuple[str, str], Diagnosis]:
    """By (experiment, task), in the order of the configuration."""
    if config.diagnostics is None:
        return {}
    chosen = config.diagnostics.tasks
    shared: dict[str, Run] = {}
    found = {}
    for experiment in experiments.values():
        for task in tasks_of(config, experiment):
            if chosen is None or task in chosen:
                name = _name(config, runs["export", experiment.name], task)
                run = shared.setdefault(name, Run("diagnose", name, experiment.name, task))
                found[experiment.name, task] = Diagnosis(experiment.name, task, run)
    return found


def _name(config: Config, export: Run, task: str) -> str:
    assert config.evaluation is not None and config.diagnostics is not None
    spec = config.evaluation.tasks[task]
    slug, _, exported = export.name.rpartition("-")
    source = known_recipe(spec.source, config.sources[spec.source])
    content = content_of(config.diagnostics, spec) | {"export": exported, "source": source}
    return f"{slug}-{task}-{digest({'stage': 'diagnose', **content}, 10)}"
