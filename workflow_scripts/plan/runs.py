"""Which runs a configuration asks for, and how they are named. Cheap: the Snakefile does this when it is parsed.

A run's key is a digest of everything the configuration says about its result and of nothing else. So experiments
share a training where they agree, and a changed learning rate makes a new run beside the old one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from workflow_scripts.code_version import CODE_VERSION
from workflow_scripts.config.base import StrictModel
from workflow_scripts.config.compute import ComputeSpec, split_gres
from workflow_scripts.config.experiments import Experiment
from workflow_scripts.config.load import Loaded
from workflow_scripts.config.schema import known, suggestion
from workflow_scripts.config.sources import source_inputs
from workflow_scripts.io import UserError, digest, read_json
from workflow_scripts.report.table import text_table

STAGES = ("pretrain", "finetune")
# How a file is fetched and what it is compared with, not what it is.
TRANSPORT = frozenset(
    {"mirrors", "connections_per_host", "bytes", "about_gb", "trust", "local", "expected_images"}
)
# Short words for run folders; flags without one appear under their own name.
SHORT = {
    "normalize_projector": "normalize",
    "use_multilayer_features": "multilayer",
    "compression_after_projection": "compress",
    "twoD_vision_embedding": "2d",
    "interleave": "interleave",
    "add_spatial_coordinates": "coordinates",
}


@dataclass(frozen=True)
class Run:
    """One piece of work under ``runs/``, with the experiment that stands for all that share it."""

    stage: str
    name: str
    experiment: str

    @property
    def folder(self) -> str:
        """The run's folder, relative to the working folder."""
        return f"runs/{self.stage}/{self.name}"

    @property
    def manifest(self) -> str:
        """What says that the run is finished."""
        return f"{self.folder}/manifest.json"


def plain(model: StrictModel) -> dict[str, Any]:
    """A section as JSON values: what differs from the defaults, and always the kind."""
    found = model.model_dump(mode="json", exclude_defaults=True)
    kind = getattr(model, "kind", None)
    return {"kind": kind, **found} if kind else found


def recipe(model: StrictModel) -> dict[str, Any]:
    """What a section says about the result: :func:`plain` without transport and bookkeeping."""
    left_out = TRANSPORT | getattr(type(model), "NOT_IN_RECIPE", frozenset())
    return {key: _strip(value) for key, value in plain(model).items() if key not in left_out}


def _strip(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strip(item) for key, item in value.items() if key not in TRANSPORT}
    return [_strip(item) for item in value] if isinstance(value, list) else value


def compact(value: Any) -> str:
    """JSON for a command line: one spelling per value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


class Plan:
    """All runs of a configuration."""

    def __init__(self, loaded: Loaded) -> None:
        self.config = loaded.config
        self.experiments = loaded.experiments
        self.source_recipe = lru_cache(None)(self._source_recipe)
        self.mixture_recipe = lru_cache(None)(self._mixture_recipe)
        self.model_recipe = lru_cache(None)(self._model_recipe)
        self.runs: dict[tuple[str, str], Run] = {}
        self.by_name: dict[tuple[str, str], Run] = {}
        for name in self.experiments:
            self._add(name)

    # -- recipes ---------------------------------------------------------------------------------------------

    def _source_recipe(self, name: str) -> dict[str, Any]:
        return recipe(self.config.sources[name])

    def _mixture_recipe(self, name: str) -> dict[str, Any]:
        mixture = self.config.mixtures[name]
        used = sorted({source for names in mixture.source_names() for source in names})
        return {
            "mixture": recipe(mixture),
            "sources": {source: self.source_recipe(source) for source in used},
        }

    def _model_recipe(self, name: str) -> dict[str, Any]:
        return recipe(self.config.models[name])

    # -- runs ------------------------------------------------------------------------------------------------

    def _add(self, name: str) -> None:
        experiment, parent = self.experiments[name], ""
        for stage in STAGES:
            parent = self._record(stage, experiment, self._training(stage, experiment, parent))
        exported = self._record("export", experiment, {"finetune": parent})
        if self.config.evaluation:
            spec = self.config.evaluation
            content = {
                "export": exported,
                "evaluation": recipe(spec),
                "source": self.source_recipe(spec.source),
            }
            self._record("evaluate", experiment, content)

    def _record(self, stage: str, experiment: Experiment, content: dict[str, Any]) -> str:
        key = digest({"stage": stage, "code": CODE_VERSION, **content}, 10)
        name = f"{slug(experiment)}-{key}"
        run = self.by_name.setdefault((stage, name), Run(stage, name, experiment.name))
        self.runs[stage, experiment.name] = run
        return key

    def _training(self, stage: str, experiment: Experiment, parent: str) -> dict[str, Any]:
        spec = experiment.stage(stage)
        model = experiment.model
        said = recipe(spec)
        content: dict[str, Any] = {
            "recipe": {key: value for key, value in said.items() if key != "mixture"},
            "mixture": self.mixture_recipe(spec.mixture),
            "interventions": experiment.flags,
            "model": {
                **plain(model),
                "llm": self.model_recipe(model.llm),
                "vision_tower": self.model_recipe(model.vision_tower),
            },
        }
        precision = self.config.compute[spec.compute].precision
        if precision != "fp32":
            content["precision"] = precision
        return {**content, "parent": parent} if parent else content

    # -- what the rules ask ----------------------------------------------------------------------------------

    def experiment_of(self, stage: str, name: str) -> Experiment:
        """The experiment behind the run folder ``runs/<stage>/<name>``. Raises KeyError for a folder of another config."""
        return self.experiments[self.by_name[stage, name].experiment]

    def run(self, stage: str, experiment: str) -> Run:
        """The run of ``experiment`` in ``stage`` (`pretrain`, `finetune`, `export`, `evaluate`)."""
        return self.runs[stage, experiment]

    def names(self, stage: str) -> list[str]:
        """The folders' names of all runs of a stage."""
        return [name for found, name in self.by_name if found == stage]

    def training_spec(self, stage: str, name: str) -> dict[str, Any]:
        """All that the launcher has to know about a training; JSON values, without defaults."""
        experiment = self.experiment_of(stage, name)
        spec = experiment.stage(stage)
        return {
            "stage": stage,
            "run": name,
            "code_version": CODE_VERSION,
            "recipe": plain(spec),
            "model": plain(experiment.model),
            "interventions": experiment.flags,
            "compute": plain(self.config.compute[spec.compute]),
        }

    def used_by(self, stage: str, name: str) -> list[str]:
        """The experiments that share the run."""
        return [item for (found, item), run in self.runs.items() if found == stage and run.name == name]

    def source_files(self, name: str) -> list[str]:
        """Local files that a source is made of; a replaced one makes it new."""
        return source_inputs(self.config.sources[name])

    def used_mixtures(self) -> list[str]:
        """The mixtures that some experiment trains on."""
        used = {
            experiment.stage(stage).mixture for experiment in self.experiments.values() for stage in STAGES
        }
        return [name for name in self.config.mixtures if name in used]

    def scanned(self) -> list[str]:
        """The sources whose images the used mixtures need."""
        return sorted(
            {
                name
                for mixture in self.used_mixtures()
                for name in self.config.mixtures[mixture].source_names()[1]
            }
        )

    def used_sources(self) -> list[str]:
        """The sources of the used mixtures and of the evaluation."""
        names = [
            name
            for mixture in self.used_mixtures()
            for part in self.config.mixtures[mixture].source_names()
            for name in part
        ]
        return sorted({*names, *([self.config.evaluation.source] if self.config.evaluation else [])})

    def compute(self, stage: str, name: str) -> ComputeSpec:
        """The kind of job that computes a training."""
        return self.config.compute[self.experiment_of(stage, name).stage(stage).compute]

    @property
    def retries(self) -> int:
        """How often Snakemake may start a training again."""
        used = {
            experiment.stage(stage).compute for experiment in self.experiments.values() for stage in STAGES
        }
        return max(self.config.compute[name].attempts for name in used) - 1

    def single_job(self, stage: str, name: str) -> dict[str, Any]:
        """Resources of an export (CPU) or an evaluation (one GPU where the training has some)."""
        compute = self.config.compute[self.experiment_of(stage, name).finetune.compute]
        on_gpu = stage == "evaluate" and compute.gpus_per_node > 0
        return {
            "mem_mb": min(compute.mem_mb, 64000),
            "gres": f"{split_gres(compute.gres or 'gpu')[0]}:1" if on_gpu else None,
            "train_slots": int(on_gpu),
        }

    def export_spec(self, name: str) -> dict[str, Any]:
        """What the export has to know."""
        experiment = self.experiment_of("export", name)
        tower = experiment.model.vision_tower
        named = getattr(self.config.models[tower], "repo", f"models/{tower}/model")
        return {"interventions": experiment.flags, "vision_tower": named}

    def checkpoint_spec(self, name: str) -> dict[str, Any]:
        """What stands in `experiments/<name>/checkpoint.json` besides what the manifests say."""
        experiment = self.experiments[name]
        runs = {stage: self.runs[stage, name].name for stage in (*STAGES, "export")}
        return {
            "experiment": name,
            "description": experiment.description,
            "interventions": experiment.flags,
            "runs": runs,
        }

    def evaluation_spec(self, name: str) -> dict[str, Any]:
        """The evaluation's section, in full."""
        if self.config.evaluation is None:
            raise KeyError(name)
        return self.config.evaluation.model_dump(mode="json")

    def used_folders(self) -> list[str]:
        """The run folders of this configuration's experiments."""
        return sorted(run.folder for run in self.by_name.values())


def resources_of(compute: ComputeSpec, attempt: int = 1) -> dict[str, Any]:
    """What a training asks of a cluster; None where it asks for nothing.

    With several machines the job runs in the batch script on the first of them (`mpi`), because only from there an
    inner `srun` sees the whole allocation. `--signal` lets a training save ahead of its time limit.
    """
    several = compute.nodes > 1
    gres = compute.gres or (f"gpu:{compute.gpus_per_node}" if compute.gpus_per_node else None)
    extra = f"--signal=TERM@{compute.save_before_end_s} --open-mode=append"
    return {
        "mem_mb": compute.mem_mb,
        "runtime": compute.runtime_min,
        "nodes": compute.nodes,
        "gres": gres,
        "mpi": "srun" if several else None,
        "tasks": compute.nodes if several else None,
        "tasks_per_gpu": 0 if gres else None,
        "slurm_extra": f"{extra} --ntasks-per-node=1" if several else extra,
        "train_slots": 1 if compute.gpus_per_node else 0,
    }


def announce(plan: Plan) -> None:
    """Prints where the results are. Called at the end of a successful run."""
    lines = []
    for name in plan.experiments:
        folder = Path("experiments") / name
        if (folder / "checkpoint.json").is_file():
            lines.append(f"  {name:<24} {folder}/hf")
    if lines:
        print(
            "\ncheckpoints (checkpoint.json beside each says what it is):", *lines, sep="\n", file=sys.stderr
        )
    table = accuracy_table(
        {name: run.manifest for (stage, name), run in plan.runs.items() if stage == "evaluate"}
    )
    if table:
        print(
            "\naccuracy in % (as is, vision tokens permuted, blank picture):",
            table,
            sep="\n",
            file=sys.stderr,
        )
    if Path("report/index.html").is_file():
        print(f"\nreport: {Path('report/index.html').absolute()}\n", file=sys.stderr)


def accuracy_table(manifests: Mapping[str, str]) -> str:
    """The evaluations' accuracies as a text table, one line an experiment; empty when there are none."""
    return text_table(
        {name: read_json(Path(path)) for name, path in manifests.items() if Path(path).is_file()}
    )


def check_targets(plan: Plan, targets: Iterable[str]) -> None:
    """Raises UserError for a checkpoint of an experiment that does not exist, before Snakemake only says "no rule"."""
    for target in targets:
        parts = Path(target).parts[-3:]
        if len(parts) == 3 and parts[0] == "experiments" and parts[2] == "checkpoint.json":
            name = parts[1]
            if name not in plan.experiments:
                advice = suggestion(name, plan.experiments, "add it to the section experiments")
                raise UserError(
                    f"{target}: no experiment is called {name!r}; experiments: {known(plan.experiments)}; {advice}"
                )


def check_containers(plan: Plan) -> None:
    """Raises UserError when a training on several nodes is to run in a container, before a job waits in a queue for that."""
    for stage in STAGES:
        for run in plan.names(stage):
            nodes = plan.compute(stage, run).nodes
            if nodes > 1:
                name = plan.experiment_of(stage, run).stage(stage).compute
                raise UserError(
                    f"compute.{name}.nodes: found {nodes}, for runs/{stage}/{run}; inside a container it must be 1: a job on several "
                    "nodes starts its processes with Slurm's srun, which would start them outside of the container. Use a virtual "
                    "environment or conda for it (docs/slurm.md)"
                )


def slug(experiment: Experiment) -> str:
    """A readable beginning of a run's folder: its flags, not its experiment's name, since runs are shared."""
    flags = experiment.flags
    words = [SHORT.get(key, key) for key, value in flags.items() if value is True]
    size = flags.get("final_spatial_size")
    if size is not None:
        words.append(str(size))
    return "-".join(words) or "vanilla"
