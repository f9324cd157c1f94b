"""What a plan needs: files to fetch, space on the disk, trackers. Asks no server and reads no data."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow_scripts.config.models import HubModel
from workflow_scripts.config.sources import HubSource, PathSource, UrlSource
from workflow_scripts.launch.preflight import importable, tracker_problem
from workflow_scripts.plan.plan import Plan
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


def hub_cache() -> Path:
    """The folder of the hub client's cache, without importing the client."""
    if (cache := os.environ.get("HF_HUB_CACHE")) is not None:
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME")
    base = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return base.expanduser() / "hub"


def cached_in_hub(repo: str, repo_type: str, revision: str, path: str) -> bool:
    """True when the client's cache has the file at this revision."""
    snapshots = hub_cache() / f"{repo_type}s--{repo.replace('/', '--')}" / "snapshots"
    return snapshots.is_dir() and any(
        (folder / path).exists() for folder in snapshots.iterdir() if folder.name.startswith(revision)
    )


def source_items(name: str, spec: Any, folder: Path) -> list[Item]:
    """The files of a source; nothing for a drawn one."""
    if isinstance(spec, PathSource):
        found = [*([spec.images] if spec.images else []), *spec.annotations]
        return [Item(path, None, 0, "yours, used in place") for path in found]
    if not isinstance(spec, HubSource | UrlSource):
        return []
    return [_file_item(name, spec, file, folder) for file in spec.files]


def _file_item(name: str, spec: Any, file: Any, folder: Path) -> Item:
    total = float(file.bytes) if file.bytes else (file.about_gb * GB if file.about_gb else None)
    label, target = f"{name}/{file.name}", folder / file.name
    if (file.role == "images" and spec.local.images) or (
        file.role == "annotations" and spec.local.annotations
    ):
        return Item(label, total, total or 0, "yours, used in place")
    if target.is_file():
        return Item(label, total, total or 0, "there")
    if isinstance(spec, HubSource) and cached_in_hub(spec.repo, spec.repo_type, spec.revision, file.path):
        return Item(label, total, total or 0, "in the hub's cache")
    part = target.with_name(target.name + ".part")
    if part.is_file():
        return Item(label, total, part.stat().st_size, f"{part.stat().st_size / GB:.2f} GB of it are there")
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
    total = 0.0
    for mixture in plan.used_mixtures():
        for part in plan.config.mixtures[mixture].parts:
            spec = plan.config.sources[part.annotations]
            items = source_items(part.annotations, spec, Path("data/sources") / part.annotations)
            roles = [file.role for file in getattr(spec, "files", ())]
            total += sum(
                item.total or 0 for item, role in zip(items, roles, strict=False) if role == "annotations"
            )
    return total


def checkpoint_bytes(plan: Plan) -> tuple[float, float]:
    """(finished checkpoints of all runs, the state of the largest training while it runs); 0 where unknown.

    A finished finetune is as large as its LLM; the export has it in two layouts. Mixed-precision training state is
    about seven times that (weights, master weights, two moments), kept ``save_total_limit`` times and once more
    while a new one is written.
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
    """What `report_to` names and this interpreter lacks, in words. Jobs that run in a container or conda have their own."""
    wanted = {(stage, tracker) for stage, spec in plan.stage_specs() for tracker in spec.report_to}
    return [tracker_problem(stage, tracker) for stage, tracker in sorted(wanted) if not importable(tracker)]
