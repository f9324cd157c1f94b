"""Tokens and hours of a training, as far as its survey and earlier trainings say them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from llava_ext.flops import TERA, Counted
from workflow_scripts.io import read_json
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plan.runs import Run
from workflow_scripts.plan.sizes import products
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


def flops_of(plan: Plan, run: Run) -> float | None:
    """Operations of all steps together (llava_ext/flops.py), from the survey's lengths; None where it or the
    models' sizes are not there yet.
    """
    tokens, experiment = tokens_of(plan, run), plan.experiments[run.experiment]
    found, model = surveyed_layout(plan, run), products(plan.config, experiment, run.stage)
    if tokens is None or found is None or model is None or "histogram" not in found:
        return None
    every, times = found["all"], tokens / found["all"]["tokens"]
    return times * model.flops(
        Counted(every["tokens"], _pairs(found["histogram"]), every["labels"], every["with_picture"])
    )


def _pairs(histogram: Mapping[str, list[int]]) -> float:
    """Pairs of tokens that see each other, taking every sample for one of its class's middle length."""
    edges, pairs = histogram["edges"], 0.0
    for counts in (histogram["text_only"], histogram["with_picture"]):
        for low, high, count in zip(edges, edges[1:], counts, strict=False):
            pairs += count * ((low + high) / 2) ** 2 / 2
    return pairs


@dataclass(frozen=True)
class Speed:
    """What a kind of job does in a second: tokens, and operations of each of its devices."""

    tokens: float
    flops: float | None


Speeds = Mapping[tuple[str, str], Speed]
"""By the stage and a name: that of the kind of job, or of the card (`80 GB`)."""


def measured_speeds(plan: Plan) -> Speeds:
    """The medians over trainings that are finished here."""
    found: dict[tuple[str, str], list[Speed]] = {}
    for run in plan.trainings():
        if (speed := _speed(Path(run.manifest))) is not None:
            for name in _names(plan, run):
                found.setdefault((run.stage, name), []).append(speed)
    return {key: _median(speeds) for key, speeds in found.items()}


def _names(plan: Plan, run: Run) -> list[str]:
    """What trainings may share a speed by: the kind of job, then the card."""
    compute = plan.compute(run.stage, run.name)
    card = [f"{compute.gpu_gb:g} GB"] if compute.gpu_gb and compute.gpus_per_node else []
    return [plan.kind(run), *card]


def _median(speeds: list[Speed]) -> Speed:
    flops = [speed.flops for speed in speeds if speed.flops]
    return Speed(median(speed.tokens for speed in speeds), median(flops) if flops else None)


def _speed(manifest: Path) -> Speed | None:
    rows = metrics((manifest, read_json(manifest))) if manifest.is_file() else []
    speeds = [
        Speed(float(row["tokens_per_s"]), row["tflop_per_s"] * TERA if "tflop_per_s" in row else None)
        for row in rows
        if "tokens_per_s" in row
    ]
    return _median(speeds) if speeds else None


def hours_of(plan: Plan, run: Run, tokens: int | None, speeds: Speeds) -> tuple[float | None, bool]:
    """Hours of a training, and whether they were computed from its operations (else its tokens) and a speed
    that was seen here (:func:`measured_speeds`); otherwise they are what the configuration expects.
    """
    compute = plan.compute(run.stage, run.name)
    kind, *card = [speeds.get((run.stage, name)) for name in _names(plan, run)]
    for speed in (kind, *card):
        flops = flops_of(plan, run) if speed and speed.flops else None
        if flops and speed and speed.flops:
            return flops / (speed.flops * compute.processes) / 3600, True
    if tokens and kind:
        return tokens / kind.tokens / 3600, True
    return compute.hours(run.stage), False
