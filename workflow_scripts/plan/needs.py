"""What a plan needs: files to fetch, space on the disk, trackers. Asks no server and reads no data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow_scripts.acquire.hub_cache import cached_in_hub
from workflow_scripts.config.models import HubModel
from workflow_scripts.config.sources import RemoteFile, Source
from workflow_scripts.disk import size_text
from workflow_scripts.launch.preflight import importable, tracker_problem
from workflow_scripts.plan.plan import Plan
from workflow_scripts.sources import KINDS
from workflow_scripts.stages import STAGES

GB = 1e9


@dataclass(frozen=True)
class Item:
    """One file (or model) that is needed: its size if known, what of it is there, and where."""

    name: str
    total: float | None
    there: float
    state: str

    @property
    def missing(self) -> float:
        """Bytes still to fetch, as far as known."""
        return max(0.0, (self.total or 0.0) - self.there)


def source_items(name: str, spec: Source, folder: Path) -> list[Item]:
    """The files of a source: those to fetch, or the user's own; none of a drawn one."""
    own = [Item(path, None, 0, "yours, used in place") for _, path in spec.own().paths()]
    return [_file_item(name, spec, file, folder) for file in spec.remote()] or own


def size_of(file: RemoteFile) -> float | None:
    """A file's bytes, as far as the configuration says."""
    return float(file.bytes) if file.bytes else (file.about_gb * GB if file.about_gb else None)


def _file_item(name: str, spec: Source, file: Any, folder: Path) -> Item:
    total, cached = size_of(file), KINDS[spec.kind].cached
    label, target = f"{name}/{file.name}", folder / file.name
    if spec.replaced(file):
        return Item(label, total, total or 0, "yours, used in place")
    several = getattr(file, "is_pattern", False)
    if target.is_file() or (several and (folder / "manifest.json").is_file()):
        return Item(label, total, total or 0, "there")
    if cached is not None and cached(spec, file):
        return Item(label, total, total or 0, "in the hub's cache")
    part = target.with_name(target.name + ".part")
    if part.is_file():
        return Item(label, total, part.stat().st_size, f"{size_text(part.stat().st_size)} of it are there")
    return Item(label, total, 0, "to fetch")


def model_item(name: str, spec: Any) -> Item | None:
    """A model of the hub; nothing for others."""
    if not isinstance(spec, HubModel):
        return None
    total = float(spec.bytes) if spec.bytes else None
    if (Path("models") / name / "manifest.json").is_file():
        return Item(name, total, total or 0, "there")
    if cached_in_hub(spec.repo, "model", spec.revision, "config.json"):
        return Item(name, total, total or 0, "in the hub's cache")
    return Item(name, total, 0, "to fetch")


def items_of(plan: Plan) -> list[Item]:
    """Everything that is fetched or used in place."""
    sources = [
        item
        for name in plan.used_sources()
        for item in source_items(name, plan.config.sources[name], Path("data/sources") / name)
    ]
    models = [model_item(name, plan.config.models[name]) for name in plan.used_models()]
    return sources + [item for item in models if item is not None]


def annotation_bytes(plan: Plan) -> float:
    """A mixture is about as large as the annotations that go into it."""
    parts = [part for name in plan.used_mixtures() for part in plan.config.mixtures[name].parts]
    files = [file for part in parts for file in plan.config.sources[part.annotations].remote()]
    return sum(size_of(file) or 0 for file in files if file.role == "annotations")


def checkpoint_bytes(plan: Plan) -> tuple[float, float]:
    """(finished checkpoints of all runs, the state of the largest training while it runs); 0 where unknown.

    A finished finetune is as large as its LLM; the export has it in two layouts. Mixed-precision training
    state is about seven times that (weights, master weights, two moments), kept ``save_total_limit`` times
    and once more while a new one is written.
    """
    finished, largest = 0.0, 0.0
    for run in plan.trainings():
        experiment = plan.experiments[run.experiment]
        spec = experiment.stage(run.stage)
        if not STAGES[run.stage].trains_llm:
            continue
        llm = getattr(plan.config.models[experiment.model.llm], "bytes", None) or 0
        finished += 3 * llm
        if spec.lora is None:
            largest = max(largest, 7.0 * llm * (spec.save_total_limit + 1))
    return finished, largest


def disk_needs(plan: Plan, items: Iterable[Item]) -> list[tuple[str, float]]:
    """What takes space, and how many bytes of it, as far as the configuration says."""
    finished, state = checkpoint_bytes(plan)
    models = sum(getattr(plan.config.models[name], "bytes", None) or 0 for name in plan.used_models())
    return [
        ("downloads", sum(item.missing for item in items)),
        ("merged mixtures", annotation_bytes(plan)),
        ("prepared models, at most", models),
        ("finished checkpoints and exports, about", finished),
        ("training state while a finetune runs", state),
    ]


def missing_trackers(plan: Plan) -> list[str]:
    """What `report_to` names and this interpreter lacks, in words. Jobs that run in a container or conda
    have their own.
    """
    wanted = {(stage, tracker) for stage, spec in plan.stage_specs() for tracker in spec.report_to}
    return [tracker_problem(stage, tracker) for stage, tracker in sorted(wanted) if not importable(tracker)]
