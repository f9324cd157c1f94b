"""Says what a configuration would do: what is fetched, what disk it takes, which GPU jobs run.

    python -m workflow_scripts.plan --configfile config/llava-v1.5-7b.yaml [more.yaml ...]

Asks no server and reads no data: sizes come from the configuration, the rest from what lies in the working folder.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow_scripts.config.load import load_config
from workflow_scripts.config.models import HubModel
from workflow_scripts.config.sources import HubSource, PathSource, UrlSource
from workflow_scripts.io import UserError, user_errors
from workflow_scripts.launch.preflight import importable, tracker_problem
from workflow_scripts.plan.runs import STAGES, Plan, Run

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


def used_sources(plan: Plan) -> list[str]:
    """The sources that some experiment needs, in the order of the configuration."""
    needed = {
        name
        for mixture in plan.used_mixtures()
        for names in plan.config.mixtures[mixture].source_names()
        for name in names
    }
    if plan.config.evaluation:
        needed.add(plan.config.evaluation.source)
    return [name for name in plan.config.sources if name in needed]


def used_models(plan: Plan) -> list[str]:
    """The models that some experiment is built from."""
    used = {name for e in plan.experiments.values() for name in (e.model.llm, e.model.vision_tower)}
    return [name for name in plan.config.models if name in used]


def items_of(plan: Plan) -> list[Item]:
    """Everything that is fetched or used in place."""
    sources = [
        item
        for name in used_sources(plan)
        for item in source_items(name, plan.config.sources[name], Path("data/sources") / name)
    ]
    models = [model_item(name, plan.config.models[name]) for name in used_models(plan)]
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
    for name in plan.names("finetune"):
        experiment = plan.experiment_of("finetune", name)
        llm = getattr(plan.config.models[experiment.model.llm], "bytes", None) or 0
        finished += 3 * llm
        if experiment.finetune.lora is None:
            largest = max(largest, 7.0 * llm * (experiment.finetune.save_total_limit + 1))
    return finished, largest


@dataclass(frozen=True)
class Job:
    """One training."""

    run: Run
    experiments: list[str]
    gpus: str
    hours: float | None
    gpu_hours: float | None
    finished: bool


def jobs_of(plan: Plan) -> list[Job]:
    """All trainings, stage 1 first."""
    jobs = []
    for stage in ("pretrain", "finetune"):
        for name in plan.names(stage):
            compute = plan.compute(stage, name)
            count = compute.nodes * compute.gpus_per_node
            shape = f"{compute.nodes} x {compute.gpus_per_node} GPU" if count else f"{compute.nodes} x CPU"
            hours = compute.expected_hours
            run = next(r for (s, _), r in plan.runs.items() if s == stage and r.name == name)
            total = hours * count if hours is not None else None
            done = Path(run.manifest).is_file()
            jobs.append(Job(run, plan.used_by(stage, name), shape, hours, total, done))
    return jobs


def describe_plan(plan: Plan, folder: Path | None = None) -> str:
    """The plan as text."""
    items = items_of(plan)
    lines = ["What this configuration needs", ""]
    lines += _data_lines(items) + _disk_lines(plan, items, folder or Path.cwd()) + _job_lines(jobs_of(plan))
    missing = missing_trackers(plan)
    return "\n".join([*lines, *(f"  NOT INSTALLED: {text}" for text in missing), *[""][: len(missing)]])


def missing_trackers(plan: Plan) -> list[str]:
    """What `report_to` names and this interpreter lacks, in words. Jobs that run in a container or conda have their own."""
    wanted = {
        (stage, tracker)
        for experiment in plan.experiments.values()
        for stage in STAGES
        for tracker in experiment.stage(stage).report_to
    }
    return [tracker_problem(stage, tracker) for stage, tracker in sorted(wanted) if not importable(tracker)]


def _size(value: float | None) -> str:
    return "       ?" if value is None else f"{value / GB:8.2f}"


def _data_lines(items: Iterable[Item]) -> list[str]:
    items = list(items)
    if not items:
        return ["  Nothing is fetched: the data are made on this machine.", ""]
    width = max(len(item.name) for item in items)
    lines = [f"  {'data and models':<{width}}        GB"]
    lines += [f"  {item.name:<{width}}  {_size(item.total)}  {item.state}" for item in items]
    missing = sum(item.missing for item in items)
    unknown = sum(item.total is None and item.state == "to fetch" for item in items)
    more = f", and {unknown} of unknown size" if unknown else ""
    return [*lines, f"  {'to fetch in all':<{width}}  {_size(missing)}{more}", ""]


def disk_needs(plan: Plan, items: Iterable[Item]) -> list[tuple[str, float]]:
    """What takes space, and how many bytes of it, as far as the configuration says."""
    finished, state = checkpoint_bytes(plan)
    models = sum(getattr(plan.config.models[name], "bytes", None) or 0 for name in used_models(plan))
    return [
        ("downloads", sum(item.missing for item in items)),
        ("merged mixtures", annotation_bytes(plan)),
        ("prepared models, at most", models),
        ("finished checkpoints and exports, about", finished),
        ("training state while a finetune runs", state),
    ]


def _disk_lines(plan: Plan, items: Iterable[Item], folder: Path) -> list[str]:
    needs = disk_needs(plan, items)
    needed = sum(size for _, size in needs)
    free = shutil.disk_usage(folder).free
    if needed == 0:
        return [f"  disk: {free / GB:.1f} GB are free in {folder}", ""]
    lines = ["  disk                                       GB"]
    for what, value in (*needs, ("needed", needed), ("free here", free)):
        lines.append(f"  {what:<40} {value / GB:7.1f}")
    if needed > free:
        lines.append(
            f"  NOT ENOUGH: {(needed - free) / GB:.1f} GB are missing in {folder}; see --directory of Snakemake"
        )
    return [*lines, ""]


def _job_lines(jobs: list[Job]) -> list[str]:
    width = max(len(job.run.name) for job in jobs)
    lines = [f"  {'trainings':<{width + 10}}  jobs of       hours  for"]
    for job in jobs:
        hours = "   done" if job.finished else ("      ?" if job.hours is None else f"{job.hours:7.1f}")
        used = ", ".join(job.experiments)
        lines.append(f"  {job.run.stage:<9} {job.run.name:<{width}}  {job.gpus:<12}{hours}  {used}")
    left = [job for job in jobs if not job.finished]
    known = [job.gpu_hours for job in left if job.gpu_hours]
    total = f", about {sum(known):.0f} GPU hours" if known else ""
    return [*lines, f"  {len(left)} of {len(jobs)} trainings are to be done{total}", ""]


def is_dry_run(argv: Sequence[str]) -> bool:
    """True when Snakemake's command line asks for a dry run: it does not tell a Snakefile while it reads it."""
    return any(
        word in ("--dry-run", "--dryrun") or re.fullmatch(r"-[pqFfkt]*n[npqFfkt]*", word) is not None
        for word in argv
    )


def load_files(files: Sequence[Path]) -> Plan:
    """Reads configuration files as Snakemake does: later ones are merged into earlier ones."""
    import yaml

    merged: dict[str, Any] = {}
    for path in files:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{path}: the file does not exist; give the path of a configuration file"
            ) from None
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not valid YAML: {error}") from None
        _merge(merged, content or {})
    return Plan(load_config(merged, list(files)))


def _merge(base: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the plan of a configuration."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_scripts.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--configfile", nargs="+", type=Path, default=[Path("config/config.yaml")])
    options = parser.parse_args(argv)
    with user_errors():
        print(describe_plan(load_files(options.configfile)))


if __name__ == "__main__":
    main()
