"""Sorts the manifests that a report is made from, and puts together what belongs to each experiment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workflow_scripts.io import UserError, read_json
from workflow_scripts.manifests import left_out
from workflow_scripts.stages import STAGES

Manifest = tuple[Path, dict[str, Any]]


@dataclass
class Collected:
    """The manifests by kind, each under its own name."""

    checkpoints: dict[str, Manifest] = field(default_factory=dict)
    evaluations: dict[tuple[str, str], Manifest] = field(default_factory=dict)
    comparisons: dict[str, Manifest] = field(default_factory=dict)
    diagnostics: dict[str, Manifest] = field(default_factory=dict)
    trainings: dict[tuple[str, str], Manifest] = field(default_factory=dict)
    mixtures: dict[str, Manifest] = field(default_factory=dict)
    surveys: dict[str, Manifest] = field(default_factory=dict)
    scans: dict[str, Manifest] = field(default_factory=dict)
    sources: dict[str, Manifest] = field(default_factory=dict)


def collect(paths: Iterable[Path]) -> Collected:
    """Reads manifests of any kind, in any order. Raises UserError for a file that is none."""
    found = Collected()
    for path in paths:
        content = read_json(path)
        keys = content.keys() if isinstance(content, dict) else set()
        if {"experiment", "paths", "runs"} <= keys:
            found.checkpoints[content["experiment"]] = path, content
        elif {"experiment", "accuracy", "task"} <= keys:
            found.evaluations[content["experiment"], content["task"]] = path, content
        elif {"experiment", "baseline", "tasks"} <= keys:
            found.comparisons[content["experiment"]] = path, content
        elif {"experiment", "diagnostics"} <= keys:
            found.diagnostics[content["experiment"]] = path, content
        elif {"stage", "run", "folder"} <= keys:
            found.trainings[content["stage"], content["run"]] = path, content
        elif {"survey", "layouts"} <= keys:
            found.surveys[content["survey"]] = path, content
        elif {"parts", "records", "name"} <= keys:
            found.mixtures[content["name"]] = path, content
        elif {"counts", "store", "name"} <= keys:
            found.scans[content["name"]] = path, content
        elif {"annotations", "images", "name"} <= keys:
            found.sources[content["name"]] = path, content
        else:
            raise UserError(
                f"{path}: no manifest that a report is made from; allowed: experiments/*/checkpoint.json,"
                " experiments/*/comparison.json, experiments/*/diagnostics.json,"
                " experiments/*/evaluation/*.json and the manifest.json files of sources, scans, mixtures,"
                " surveys and trainings"
            )
    return found


def evaluations_by_task(found: Collected) -> dict[str, dict[str, dict[str, Any]]]:
    """The scores by task and experiment, the experiments in the order of their checkpoints."""
    order = {name: place for place, name in enumerate(found.checkpoints)}
    keys = sorted(found.evaluations, key=lambda key: order.get(key[0], len(order)))
    tasks: dict[str, dict[str, dict[str, Any]]] = {}
    for name, task in keys:
        tasks.setdefault(task, {})[name] = found.evaluations[name, task][1]
    return tasks


def training_users(found: Collected) -> dict[tuple[str, str], list[str]]:
    """Which experiments each training belongs to, in the order of the stages."""
    users: dict[tuple[str, str], list[str]] = {}
    for stage in STAGES:
        for key in found.trainings:
            if key[0] == stage:
                users[key] = [
                    name
                    for name, (_, content) in found.checkpoints.items()
                    if content["runs"].get(stage) == key[1]
                ]
    return users


def state_folder(manifest: Manifest) -> Path:
    """Where the training's own files are."""
    path, content = manifest
    return path.parent / str(content["folder"])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a cut last line of an interrupted run is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def metrics(manifest: Manifest) -> list[dict[str, Any]]:
    """One row a step; of a step that was computed twice (after an interruption) the later."""
    rows = {
        int(row["step"]): row
        for row in read_lines(state_folder(manifest) / "metrics.jsonl")
        if "step" in row and "loss" in row
    }
    return [rows[step] for step in sorted(rows)]


def provenance(manifest: Manifest) -> dict[str, Any]:
    """What the training recorded about itself; empty when the file is gone."""
    path = state_folder(manifest) / "provenance.json"
    return dict(read_json(path)) if path.is_file() else {}


def training_row(key: tuple[str, str], manifest: Manifest, users: Sequence[str]) -> dict[str, Any]:
    """One training for the page's table."""
    rows, about = metrics(manifest), provenance(manifest)
    attempts = [row for row in read_lines(state_folder(manifest) / "attempts.jsonl") if "started" in row]
    recipe: Mapping[str, Any] = about.get("configuration", {}).get("recipe", {})
    times = [row["time"] for row in rows if "time" in row]
    speeds = [row["samples_per_s"] for row in rows if "samples_per_s" in row]
    return {
        "stage": key[0],
        "run": key[1],
        "experiments": list(users),
        "steps": manifest[1].get("step"),
        "loss": (
            manifest[1]
            .get("metrics", {})
            .get("mean_loss_of_last_twentieth", manifest[1].get("metrics", {}).get("final_loss"))
        ),
        "seconds": times[-1] - times[0] if len(times) > 1 else None,
        "samples_per_s": sorted(speeds)[len(speeds) // 2] if speeds else None,
        "attempts": len(attempts) or None,
        "learning_rate": recipe.get("learning_rate"),
        "global_batch_size": recipe.get("global_batch_size"),
        "mixture": recipe.get("mixture"),
        "folder": state_folder(manifest),
        "skipped": left_out(manifest[1]),
        "provenance": about,
    }


def relative(path: Path, page: Path) -> str:
    """A link from the page to a file or folder beside it."""
    return Path(os.path.relpath(path.absolute(), page.parent.absolute())).as_posix()
