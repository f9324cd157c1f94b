"""Which runs a configuration asks for, and how they are named.

A run's key is a digest of everything the configuration says about its result and of nothing else. So
experiments share a training where they agree, and a changed learning rate makes a new run beside the old one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from workflow_scripts.code_version import CODE_VERSION
from workflow_scripts.config.experiments import Adopted, Experiment
from workflow_scripts.config.schema import Config
from workflow_scripts.io import UserError, digest
from workflow_scripts.plan.names import adopted_slug, slug
from workflow_scripts.plan.source_keys import known_recipe
from workflow_scripts.plan.specs import plain, recipe
from workflow_scripts.stages import STAGES, last_stage


@dataclass(frozen=True)
class Run:
    """One piece of work under ``runs/``, with the experiment (and the evaluation's task) that stands for all
    that share it.
    """

    stage: str
    name: str
    experiment: str
    task: str = ""

    @property
    def folder(self) -> str:
        """The run's folder, relative to the working folder."""
        return f"runs/{self.stage}/{self.name}"

    @property
    def manifest(self) -> str:
        """What says that the run is finished."""
        return f"{self.folder}/manifest.json"


def find_runs(config: Config, experiments: Mapping[str, Experiment]) -> dict[tuple[str, str], Run]:
    """The run of each (stage, experiment); stages are those of the register, then `export`."""
    shared: dict[tuple[str, str], Run] = {}
    found: dict[tuple[str, str], Run] = {}
    for experiment in experiments.values():
        for stage, key in run_keys(config, experiment):
            name = f"{slug(experiment)}-{key}"
            run = shared.setdefault((stage, name), Run(stage, name, experiment.name))
            found[stage, experiment.name] = run
            if stage in STAGES:
                _check_skipped(config, stage, experiment, experiments[run.experiment])
    return found


def find_adopted(config: Config, adopted: Mapping[str, Adopted]) -> dict[tuple[str, str], Run]:
    """The exports of checkpoints that are not trained here, by ("export", experiment)."""
    shared: dict[str, Run] = {}
    found = {}
    for item in adopted.values():
        content = {"models": [recipe(config.models[name]) for name in item.models]}
        name = f"{adopted_slug(config.models[item.checkpoint])}-{_key('export', content)}"
        found["export", item.name] = shared.setdefault(name, Run("export", name, item.name))
    return found


def _check_skipped(config: Config, stage: str, one: Experiment, other: Experiment) -> None:
    """Raises UserError when two experiments share a training and disagree on what it leaves out."""
    mine, theirs = one.stage(stage).mixture, other.stage(stage).mixture
    if config.mixtures[mine].skip_samples != config.mixtures[theirs].skip_samples:
        raise UserError(
            f"mixtures.{mine}.skip_samples and mixtures.{theirs}.skip_samples differ, but the mixtures are"
            f" the same, and {one.name} and {other.name} share the training in {stage}; make them equal"
        )


def run_keys(config: Config, experiment: Experiment) -> Iterator[tuple[str, str]]:
    """The keys of an experiment's runs by stage; each has those in it that it is made from."""
    keys: dict[str, str] = {}
    for stage in STAGES.values():
        content = training_content(config, experiment, stage.name)
        keys[stage.name] = _key(
            stage.name, content | ({"parent": keys[stage.parent]} if stage.parent else {})
        )
        yield stage.name, keys[stage.name]
    yield "export", _key("export", {last_stage(): keys[last_stage()]})


def _key(stage: str, content: Mapping[str, Any]) -> str:
    return digest({"stage": stage, "code": CODE_VERSION, **content}, 10)


def training_content(config: Config, experiment: Experiment, stage: str) -> dict[str, Any]:
    """What the configuration says about the result of a training, its parent aside."""
    spec, model = experiment.stage(stage), experiment.model
    said, precision = recipe(spec), config.compute[spec.compute].precision
    content: dict[str, Any] = {
        "recipe": {key: value for key, value in said.items() if key != "mixture"},
        "mixture": mixture_content(config, spec.mixture),
        "interventions": experiment.flags,
        "model": {
            **plain(model),
            "llm": recipe(config.models[model.llm]),
            "vision_tower": recipe(config.models[model.vision_tower]),
        },
    }
    return content if precision == "fp32" else {**content, "precision": precision}


def mixture_content(config: Config, name: str) -> dict[str, Any]:
    """A mixture with the sources that it is made of."""
    mixture = config.mixtures[name]
    used = sorted({source for names in mixture.source_names() for source in names})
    return {
        "mixture": recipe(mixture),
        "sources": {source: known_recipe(source, config.sources[source]) for source in used},
    }
