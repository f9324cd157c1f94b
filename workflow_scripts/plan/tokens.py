"""Tokens and hours of a training, as far as its survey and earlier trainings say them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from workflow_scripts.io import read_json
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plan.runs import Run
from workflow_scripts.report.collect import metrics
from workflow_scripts.survey.layout import image_layout


def surveyed_layout(plan: Plan, run: Run) -> dict[str, Any] | None:
    """What the survey counted for a training; None before it is made, or where it is of another
    configuration.
    """
    path = Path(plan.survey_of(run.stage, run.name).manifest)
    if not path.is_file():
        return None
    experiment = plan.experiments[run.experiment]
    mine = image_layout(experiment.model, experiment.interventions)
    return next((layout for layout in read_json(path)["layouts"] if mine in layout["of"]), None)


def tokens_of(plan: Plan, run: Run) -> int | None:
    """Tokens of all steps together: exact for whole epochs, the mean's multiple for a number of steps."""
    found = surveyed_layout(plan, run)
    if found is None or not found["all"]["samples"]:
        return None
    spec, every = plan.experiments[run.experiment].stage(run.stage), found["all"]
    if spec.epochs is not None:
        return round(spec.epochs * every["tokens"])
    seen = (spec.max_steps or 0) * spec.global_batch_size
    return round(seen * every["tokens"] / every["samples"])


def measured_speeds(plan: Plan) -> dict[tuple[str, str], float]:
    """Tokens per second by stage and kind of job: the median of trainings that are finished."""
    found: dict[tuple[str, str], list[float]] = {}
    for run in plan.trainings():
        if (speed := _speed(Path(run.manifest))) is not None:
            found.setdefault(_kind(plan, run), []).append(speed)
    return {kind: median(speeds) for kind, speeds in found.items()}


def _kind(plan: Plan, run: Run) -> tuple[str, str]:
    return run.stage, plan.experiments[run.experiment].stage(run.stage).compute


def _speed(manifest: Path) -> float | None:
    speeds = list(_speeds(manifest)) if manifest.is_file() else []
    return median(speeds) if speeds else None


def _speeds(manifest: Path) -> Iterator[float]:
    for row in metrics((manifest, read_json(manifest))):
        if "tokens_per_s" in row:
            yield float(row["tokens_per_s"])


def hours_of(
    plan: Plan, run: Run, tokens: int | None, speeds: Mapping[tuple[str, str], float]
) -> tuple[float | None, bool]:
    """Hours of a training, and whether they were computed from its tokens and a speed that was seen here
    (:func:`measured_speeds`); otherwise they are what the configuration expects.
    """
    speed = speeds.get(_kind(plan, run))
    if tokens and speed:
        return tokens / speed / 3600, True
    return plan.compute(run.stage, run.name).hours(run.stage), False
