"""All that a configuration asks for: its runs, and what the rules ask about them.

Cheap: the Snakefile makes one when it is parsed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow_scripts.code_version import CODE_VERSION
from workflow_scripts.config.compute import ComputeSpec, split_gres
from workflow_scripts.config.evaluation import TaskSpec
from workflow_scripts.config.experiments import Checkpoint, Experiment
from workflow_scripts.config.load import Loaded, load_files
from workflow_scripts.config.stages import StageSpec
from workflow_scripts.plan.diagnoses import Diagnosis, find_diagnoses
from workflow_scripts.plan.evaluations import Evaluation, find_evaluations, shard_files, statistics_of
from workflow_scripts.plan.fitting import fitted
from workflow_scripts.plan.questions import find_prepared
from workflow_scripts.plan.runs import Run, find_adopted, find_runs
from workflow_scripts.plan.specs import plain
from workflow_scripts.plan.surveys import Survey, find_surveys, survey_name
from workflow_scripts.stages import STAGES, last_stage


class Plan:
    """All runs of a configuration."""

    def __init__(self, loaded: Loaded) -> None:
        self.config = loaded.config
        self.experiments = loaded.experiments
        self.adopted = loaded.adopted
        every: dict[str, Checkpoint] = {**self.experiments, **self.adopted}
        self.checkpoints = {name: every[name] for name in self.config.experiments}
        self.runs = find_runs(self.config, self.experiments) | find_adopted(self.config, self.adopted)
        self.evaluations = find_evaluations(self.config, self.checkpoints, self.runs)
        prepared = find_prepared(self.config)
        self.questions = {
            item.task: prepared[item.task] for item in self.evaluations.values() if item.task in prepared
        }
        self.diagnoses = find_diagnoses(self.config, self.checkpoints, self.runs)
        answered = [run for item in self.evaluations.values() for run in (item.predict, item.score)]
        answered += [item.run for item in self.diagnoses.values()]
        self.by_name = {(run.stage, run.name): run for run in [*self.runs.values(), *answered]}
        self.surveys = find_surveys(self.experiments)
        self.kinds = fitted(self.config, self.experiments)

    # -- runs ----------------------------------------------------------------------------------------------

    def run(self, stage: str, experiment: str) -> Run:
        """The run of ``experiment`` in ``stage`` (one of the register's, or `export`)."""
        return self.runs[stage, experiment]

    def experiment_of(self, stage: str, name: str) -> Experiment:
        """The experiment behind the run folder ``runs/<stage>/<name>``. Raises KeyError for a folder of
        another config, and where nothing is trained for it.
        """
        return self.experiments[self.by_name[stage, name].experiment]

    def owner(self, stage: str, name: str) -> str:
        """The name of the experiment behind a run folder, trained here or not. Raises KeyError for a folder
        of another config.
        """
        return self.by_name[stage, name].experiment

    def names(self, stage: str) -> list[str]:
        """The folders' names of all runs of a stage."""
        return [name for found, name in self.by_name if found == stage]

    def trainings(self) -> list[Run]:
        """The runs of all stages, stage by stage."""
        return [self.by_name[stage, name] for stage in STAGES for name in self.names(stage)]

    def survey_of(self, stage: str, name: str) -> Survey:
        """The survey that a training waits for."""
        return self.surveys[survey_name(self.experiment_of(stage, name), stage)]

    def used_by(self, stage: str, name: str) -> list[str]:
        """The experiments that share the run."""
        return [item for (found, item), run in self.runs.items() if found == stage and run.name == name]

    def used_folders(self) -> list[str]:
        """The folders of this configuration's runs, and of the questions that are written for its tasks."""
        written = [item.folder for item in self.questions.values()]
        return sorted([*(run.folder for run in self.by_name.values()), *written])

    def compute(self, stage: str, name: str) -> ComputeSpec:
        """The kind of job that computes a training, with a value in place of every `auto`."""
        return self.kinds[self.experiment_of(stage, name).stage(stage).compute, stage]

    def kind(self, run: Run) -> str:
        """The name of the kind of job that computes a training."""
        return self.experiments[run.experiment].stage(run.stage).compute

    def single_job(self, stage: str, name: str) -> dict[str, Any]:
        """Resources of an export (CPU), of predictions or a diagnosis (one GPU where the training has
        some).
        """
        compute = self.config.compute[self.single_compute(stage, name)]
        on_gpu = stage in ("predict", "diagnose") and compute.gpus_per_node > 0
        return {
            "mem_mb": min(compute.mem_mb, 64000),
            "gres": f"{split_gres(compute.gres or 'gpu')[0]}:1" if on_gpu else None,
            "train_slots": int(on_gpu),
        }

    def single_compute(self, stage: str, name: str) -> str:
        """The kind of job that an export, predictions or a diagnosis take their resources from: that of the
        experiment's last stage, or of the common one where nothing is trained.
        """
        trained = self.experiments.get(self.owner(stage, name))
        spec: StageSpec = (
            trained.stage(last_stage()) if trained else getattr(self.config.stages, last_stage())
        )
        return spec.compute

    # -- what is used --------------------------------------------------------------------------------------

    def stage_specs(self) -> list[tuple[str, StageSpec]]:
        """All (stage, recipe) of all experiments."""
        return [(stage, item.stage(stage)) for item in self.experiments.values() for stage in STAGES]

    def used_mixtures(self) -> list[str]:
        """The mixtures that some experiment trains on, in the order of the configuration."""
        used = {spec.mixture for _, spec in self.stage_specs()}
        return [name for name in self.config.mixtures if name in used]

    def used_compute(self) -> dict[str, ComputeSpec]:
        """The kinds of job that some training asks for, in the order of the configuration."""
        found: dict[str, ComputeSpec] = {}
        for (name, _), spec in self.kinds.items():  # the stage with the larger micro-batch stands for both
            other = found.get(name, spec)
            found[name] = max(spec, other, key=lambda item: int(item.per_device_batch_size))
        return {name: found[name] for name in self.config.compute if name in found}

    def used_models(self) -> list[str]:
        """The models that some experiment is built from or is, in the order of the configuration."""
        used = {name for e in self.experiments.values() for name in (e.model.llm, e.model.vision_tower)}
        used |= {name for item in self.adopted.values() for name in item.models}
        return [name for name in self.config.models if name in used]

    def used_sources(self) -> list[str]:
        """The sources of the used mixtures and of the evaluation, in the order of the configuration."""
        used = {
            name
            for mixture in self.used_mixtures()
            for part in self.config.mixtures[mixture].source_names()
            for name in part
        } | {self.task_spec(item.task).source for item in self.evaluations.values()}
        return [name for name in self.config.sources if name in used]

    def scanned(self) -> list[str]:
        """The sources whose images the used mixtures need."""
        mixtures = [self.config.mixtures[name] for name in self.used_mixtures()]
        return sorted({name for mixture in mixtures for name in mixture.source_names()[1]})

    def source_files(self, name: str) -> list[str]:
        """Local files that a source is made of; a replaced one makes it new."""
        return self.config.sources[name].own().files()

    @property
    def retries(self) -> int:
        """How often Snakemake may start a training again."""
        return max((spec.attempts for spec in self.used_compute().values()), default=1) - 1

    # -- what the steps have to know -----------------------------------------------------------------------

    def mixture_spec(self, name: str) -> dict[str, Any]:
        """What the merge has to know: all but what only trainings heed."""
        spec = self.config.mixtures[name]
        return {key: value for key, value in plain(spec).items() if key not in spec.NOT_IN_RECIPE}

    def training_spec(self, stage: str, name: str) -> dict[str, Any]:
        """All that the launcher has to know about a training; JSON values, without defaults."""
        experiment = self.experiment_of(stage, name)
        spec = experiment.stage(stage)
        skipped = self.config.mixtures[spec.mixture].skip_samples
        return {
            **({"skip_samples": list(skipped)} if skipped else {}),
            "stage": stage,
            "run": name,
            "code_version": CODE_VERSION,
            "recipe": plain(spec),
            "model": plain(experiment.model),
            "interventions": experiment.flags,
            "compute": plain(self.kinds[spec.compute, stage]),
        }

    def export_spec(self, name: str) -> dict[str, Any]:
        """What the export has to know."""
        if self.owner("export", name) in self.adopted:
            return {}
        experiment = self.experiment_of("export", name)
        tower = experiment.model.vision_tower
        named = getattr(self.config.models[tower], "repo", f"models/{tower}/model")
        return {"interventions": experiment.flags, "vision_tower": named}

    def checkpoint_spec(self, name: str) -> dict[str, Any]:
        """What stands in `experiments/<name>/checkpoint.json` besides what the manifests say."""
        about = {"experiment": name, "description": self.checkpoints[name].description}
        if name in self.adopted:
            return {**about, "runs": {"export": self.runs["export", name].name}}
        return {
            **about,
            "interventions": self.experiments[name].flags,
            "runs": {stage: self.runs[stage, name].name for stage in (*STAGES, "export")},
        }

    # -- evaluations ---------------------------------------------------------------------------------------

    def task_spec(self, task: str) -> TaskSpec:
        """The section of an evaluation's task."""
        if self.config.evaluation is None:
            raise KeyError(task)
        return self.config.evaluation.tasks[task]

    def task_of(self, stage: str, name: str) -> tuple[str, TaskSpec]:
        """The task of a run of predictions, scores or a diagnosis. Raises KeyError for a folder of another
        config.
        """
        task = self.by_name[stage, name].task
        return task, self.task_spec(task)

    def questions_manifest(self, task: str) -> str:
        """What the questions of a task are read from: its source, or what was written from it."""
        if task in self.questions:
            return self.questions[task].manifest
        return f"data/sources/{self.task_spec(task).source}/manifest.json"

    def shard_files(self, name: str) -> list[str]:
        """What says that the shards of predictions are done."""
        return shard_files(self.by_name["predict", name], self.task_of("predict", name)[1])

    def evaluations_of(self, experiment: str) -> list[Evaluation]:
        """An experiment's evaluations."""
        return [item for (name, _), item in self.evaluations.items() if name == experiment]

    def diagnoses_of(self, experiment: str) -> list[Diagnosis]:
        """An experiment's diagnoses."""
        return [item for (name, _), item in self.diagnoses.items() if name == experiment]

    def diagnosed(self) -> list[str]:
        """The experiments that are looked into."""
        return list(dict.fromkeys(name for name, _ in self.diagnoses))

    @property
    def baseline(self) -> str | None:
        """The experiment that all others are compared with; None without an evaluation."""
        spec = self.config.evaluation
        return (spec.baseline or next(iter(self.checkpoints))) if spec else None

    def comparisons(self) -> list[str]:
        """The experiments that share a task with the baseline."""
        asked = {item.task for item in self.evaluations_of(self.baseline or "")}
        others = [name for name in self.checkpoints if name != self.baseline]
        return [name for name in others if asked & {item.task for item in self.evaluations_of(name)}]

    def score_spec(self, name: str) -> dict[str, Any]:
        """What has to be known to score predictions."""
        return {"task": plain(self.task_of("score", name)[1]), **self._statistics()}

    def comparison_spec(self, experiment: str) -> dict[str, Any]:
        """What has to be known to compare an experiment with the baseline."""
        return {"experiment": experiment, "baseline": self.baseline, **self._statistics()}

    def _statistics(self) -> dict[str, Any]:
        return statistics_of(self.config.evaluation) if self.config.evaluation else {}


def read_plan(files: Sequence[Path]) -> Plan:
    """The plan of configuration files; later ones are merged into earlier ones, as Snakemake does."""
    return Plan(load_files(files))
