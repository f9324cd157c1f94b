"""What a plan needs: files to fetch, space on the disk, trackers. Asks no server and reads no data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow_scripts.acquire.hub_cache import cached_in_hub
from workflow_scripts.config.experiments import Adopted
from workflow_scripts.config.models import HubModel, PathModel
from workflow_scripts.config.sources import RemoteFile, Source
from workflow_scripts.disk import size_text
from workflow_scripts.launch.preflight import importable, tracker_problem
from workflow_scripts.plan.answers import answers_of
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plan.sizes import model_config
from workflow_scripts.sources import KINDS
from workflow_scripts.stages import STAGES

GB = 1e9
ROW_BYTES = 600
"""An answer with its question, its score, and the line in which it waits for the others."""
DIAGNOSIS_BYTES = 1e6


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


def converted_bytes(plan: Plan) -> float:
    """Copies of checkpoints that are not trained here and are still to be made. A stock LLaVA of transformers
    is linked; what a checkpoint is that was not fetched yet, only its layout says.
    """
    runs = {plan.run("export", name).name: item for name, item in plan.adopted.items()}
    left = [item for name, item in runs.items() if not Path(f"runs/export/{name}/manifest.json").is_file()]
    return sum(_model_bytes(plan, item.checkpoint) for item in left if not _is_linked(plan, item))


def _is_linked(plan: Plan, item: Adopted) -> bool:
    described = model_config(plan.config, item.checkpoint)
    return not item.tower and described.get("model_type") == "llava"


def _model_bytes(plan: Plan, name: str) -> float:
    spec = plan.config.models[name]
    if isinstance(spec, PathModel):
        return sum(path.stat().st_size for path in Path(spec.path).expanduser().glob("*") if path.is_file())
    return float(getattr(spec, "bytes", None) or 0)


def written_bytes(plan: Plan) -> float:
    """Pictures that are written once more with the questions of a task of lmms-eval: about its files."""
    found = 0.0
    for task, questions in plan.questions.items():
        spec = plan.task_spec(task)
        if spec.lmms is None or Path(questions.manifest).is_file():
            continue
        wanted = [spec.lmms.files, *([spec.lmms.pictures.files] if spec.lmms.pictures else [])]
        files = [file for file in plan.config.sources[spec.source].remote() if file.role == "annotations"]
        found += sum(size_of(file) or 0 for file in files if _ends_as(file, wanted))
    return found


def _ends_as(file: Any, wanted: Iterable[str]) -> bool:
    return any(Path(file.name).match(end) for end in wanted)


def answer_bytes(plan: Plan) -> float:
    """Rows of answers and scores, and diagnoses, that are still to be made."""
    runs = {item.predict.name: item for item in plan.evaluations.values()}
    left = [item.task for item in runs.values() if not Path(item.predict.manifest).is_file()]
    looks = {item.run.manifest for item in plan.diagnoses.values()}
    rows = sum(answers_of(plan, task) or 0 for task in left)
    return ROW_BYTES * rows + DIAGNOSIS_BYTES * sum(not Path(path).is_file() for path in looks)


def disk_needs(plan: Plan, items: Iterable[Item]) -> list[tuple[str, float]]:
    """What takes space, and how many bytes of it, as far as the configuration says."""
    finished, state = checkpoint_bytes(plan)
    models = sum(getattr(plan.config.models[name], "bytes", None) or 0 for name in plan.used_models())
    others = [
        ("converted checkpoints of others, at most", converted_bytes(plan)),
        ("written questions of lmms-eval", written_bytes(plan)),
        ("answers, scores and diagnoses, about", answer_bytes(plan)),
    ]
    return [
        ("downloads", sum(item.missing for item in items)),
        ("merged mixtures", annotation_bytes(plan)),
        ("prepared models, at most", models),
        ("finished checkpoints and exports, about", finished),
        ("training state while a finetune runs", state),
        *((what, size) for what, size in others if size),
    ]


def missing_trackers(plan: Plan) -> list[str]:
    """What `report_to` names and this interpreter lacks, in words. Jobs that run in a container or conda
    have their own.
    """
    wanted = {(stage, tracker) for stage, spec in plan.stage_specs() for tracker in spec.report_to}
    return [tracker_problem(stage, tracker) for stage, tracker in sorted(wanted) if not importable(tracker)]
