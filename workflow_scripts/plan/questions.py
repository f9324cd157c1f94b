"""Questions that a step of its own writes before they are asked, and the environment that it needs."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from workflow_scripts.config.schema import Config
from workflow_scripts.evaluate.lmms import VERSION
from workflow_scripts.evaluate.tasks import TASKS
from workflow_scripts.io import UserError, digest
from workflow_scripts.plan.source_keys import known_recipe

QUESTIONS = "data/questions"
IN_CONTAINER = "/opt/evaluation/bin/python"
BESIDE_THE_CODE = ".venv-evaluation/bin/python"


@dataclass(frozen=True)
class Prepared:
    """The written questions of a task."""

    name: str
    task: str

    @property
    def folder(self) -> str:
        """Where they lie, relative to the working folder."""
        return f"{QUESTIONS}/{self.name}"

    @property
    def manifest(self) -> str:
        """Has the form of a source's manifest."""
        return f"{self.folder}/manifest.json"


class Planned(Protocol):
    """What of a plan is looked at here."""

    config: Config
    questions: Mapping[str, Prepared]


def find_prepared(config: Config) -> dict[str, Prepared]:
    """By task, for those whose questions are written first; named by all that decides them."""
    tasks = config.evaluation.tasks if config.evaluation else {}
    found = {}
    for name, spec in tasks.items():
        if TASKS[spec.kind].prepared and spec.lmms is not None:
            recipe = known_recipe(spec.source, config.sources[spec.source])
            key = digest({"source": recipe, "lmms": spec.lmms.asked(), "version": VERSION}, 10)
            found[name] = Prepared(f"{name}-{key}", name)
    return found


def evaluation_python(
    plan: Planned, home: Path, usual: str, in_conda: bool, in_container: bool, *, only_planned: bool = False
) -> str:
    """The interpreter that has lmms-eval: the configured one, the environment's in conda and containers, else
    the one that `make env-evaluation` makes beside the code; ``usual`` where no task needs it.

    Raises UserError where it is not there; a dry run (``only_planned``) is told so and goes on.
    """
    configured = plan.config.python_evaluation
    if configured or in_conda or in_container:
        return configured or (IN_CONTAINER if in_container else "python")
    tasks = plan.questions
    beside = home / BESIDE_THE_CODE
    if tasks and not beside.is_file():
        missing = (
            f"evaluation.tasks.{next(iter(tasks))}: kind: lmms needs the environment with lmms-eval; make it:"
            f" make env-evaluation (in {home}), or name its interpreter as python_evaluation"
        )
        if not only_planned:
            raise UserError(missing)
        print(f"NOT INSTALLED: {missing}", file=sys.stderr)
    return str(beside) if tasks else usual


def by_name(prepared: Collection[Prepared], name: str) -> Prepared:
    """The questions of that name. Raises UserError where no task has them."""
    for item in prepared:
        if item.name == name:
            return item
    known = ", ".join(item.name for item in prepared) or "(there are none)"
    raise UserError(f"data/questions/{name} belongs to no task of this configuration; there are: {known}")
