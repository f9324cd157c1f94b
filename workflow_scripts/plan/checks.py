"""Targets and deployments that a configuration does not have."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from snakemake_interface_executor_plugins.registry import ExecutorPluginRegistry

from workflow_scripts.config.problems import known, suggestion
from workflow_scripts.io import UserError
from workflow_scripts.plan.plan import Plan


def check_targets(plan: Plan, targets: Iterable[str]) -> None:
    """Raises UserError for a result of an experiment, or of a task, that does not exist, before Snakemake
    only says "no rule".
    """
    for target in targets:
        match Path(target).parts[-4:]:
            case (
                *_,
                "experiments",
                name,
                "checkpoint.json" | "comparison.json" | "diagnostics.json" as file,
            ):
                _check_experiment(plan, target, name)
                if file == "comparison.json" and name not in plan.comparisons():
                    raise UserError(_not_compared(plan, target, name))
                if file == "diagnostics.json" and name not in plan.diagnosed():
                    raise UserError(f"{target}: {name} is not looked into; {_diagnostics_advice(plan)}")
            case ("experiments", name, "evaluation", file) if file.endswith(".json"):
                _check_experiment(plan, target, name)
                _check_task(plan, target, name, file.removesuffix(".json"))


def _check_experiment(plan: Plan, target: str, name: str) -> None:
    if name not in plan.checkpoints:
        advice = suggestion(name, plan.checkpoints, "add it to the section experiments")
        raise UserError(
            f"{target}: no experiment is called {name!r}; experiments: {known(plan.checkpoints)}; {advice}"
        )


def _check_task(plan: Plan, target: str, name: str, task: str) -> None:
    tasks = [item.task for item in plan.evaluations_of(name)]
    if task not in tasks:
        advice = suggestion(task, tasks, f"add it to evaluation.tasks (and to experiments.{name}.tasks)")
        raise UserError(f"{target}: {name} is not asked {task!r}; tasks: {known(tasks)}; {advice}")


def _diagnostics_advice(plan: Plan) -> str:
    if plan.config.diagnostics is None:
        return "add the section diagnostics: {}"
    return "none of its tasks is in diagnostics.tasks"


def _not_compared(plan: Plan, target: str, name: str) -> str:
    if name == plan.baseline:
        return f"{target}: {name} is the baseline, and is not compared; set evaluation.baseline to another"
    return f"{target}: {name} and the baseline {plan.baseline} share no task; see experiments.{name}.tasks"


def check_config_files(files: Iterable[Path]) -> None:
    """Raises UserError for a target that was taken for a configuration: `--configfile` takes every word
    behind it.
    """
    for file in files:
        parts = Path(os.path.relpath(file)).parts
        if parts[0] in ("data", "experiments", "models", "runs") and parts[-1] in TARGETS:
            target = "/".join(parts)
            raise UserError(
                f"--configfile {target}: this is a target of the workflow, not a configuration; --configfile"
                f" takes every word behind it: put the target before it, as in `snakemake {target}"
                " --configfile FILE`"
            )


TARGETS = ("checkpoint.json", "manifest.json")
NEEDED = ("input-output", "sources")
_WHY = (
    "images are read by offset from archives and trainings continue from states that lie beside their"
    " manifests, which no storage plugin carries along. Run on Slurm with a shared file system, or all of it"
    " on one machine with GPUs (docs/slurm.md)"
)


def check_executor(argv: Sequence[str]) -> None:
    """Raises UserError for an executor whose jobs see no file of this machine. ``argv`` is what Snakemake's
    own command line got; a profile that it names is read, too.
    """
    # Snakemake tells a Snakefile the executor after it has read it.
    if (cli := sys.modules.get("snakemake.cli")) is None:
        return
    try:
        with redirect_stderr(StringIO()):
            executor = cli.parse_args(list(argv))[1].executor
    except SystemExit:  # started through the API, with a command line of somebody else
        return
    if executor and ExecutorPluginRegistry().get_plugin(executor).common_settings.implies_no_shared_fs:
        raise UserError(f"--executor {executor}: its jobs see no file of this machine, but {_WHY}")


def check_shared_files(shared: Collection[str]) -> None:
    """Raises UserError when jobs would not see the working folder and the code where they lie."""
    lacking = [name for name in NEEDED if name not in shared]
    if lacking:
        raise UserError(
            f"--shared-fs-usage lacks {' and '.join(lacking)}, or the executor has no file system in common"
            f" with this machine: {_WHY}"
        )


def check_containers(plan: Plan) -> None:
    """Raises UserError when a training on several nodes is to run in a container, before a job waits in a
    queue for that.
    """
    for name, compute in plan.used_compute().items():
        if compute.nodes > 1:
            raise UserError(
                f"compute.{name}.nodes: found {compute.nodes}; inside a container it must be 1: a job on"
                " several nodes starts its processes with Slurm's srun, which would start them outside of"
                " the container. Use a virtual environment or conda for it (docs/slurm.md)"
            )
