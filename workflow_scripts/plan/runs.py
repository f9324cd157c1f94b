"""Which runs a configuration asks for, and how they are named. Cheap: the Snakefile does this when it is parsed.

A run's key is a digest of everything the configuration says about its result and of nothing else. So experiments
share a training where they agree, and a changed learning rate makes a new run beside the old one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from workflow_scripts.code_version import CODE_VERSION
from workflow_scripts.config.compute import ComputeSpec, split_gres
from workflow_scripts.config.experiments import Experiment
from workflow_scripts.config.load import Loaded
from workflow_scripts.config.sources import source_inputs
from workflow_scripts.io import digest
from workflow_scripts.plan.names import slug
from workflow_scripts.plan.specs import plain, recipe

STAGES = ("pretrain", "finetune")


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
