"""Which surveys a configuration asks for: one serves all trainings to whose samples the same happens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workflow_scripts.code_version import CODE_VERSION
from workflow_scripts.config.experiments import Experiment
from workflow_scripts.config.schema import Config
from workflow_scripts.io import canonical_json, digest
from workflow_scripts.plan.resources import STEP_JOBS
from workflow_scripts.stages import STAGES
from workflow_scripts.survey.layout import image_layout

RECORDS_OF_A_PROCESS = 25_000
"""Records for which another process pays: half a minute's work."""


@dataclass
class Survey:
    """One survey of a mixture.

    Attributes:
        uses: by their JSON, each once: stage, layout of an image's tokens, bounds.
    """

    name: str
    mixture: str
    llm: str
    prompt_version: str
    model_max_length: int
    uses: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def manifest(self) -> str:
        """What says that the survey is finished and within its bounds."""
        return f"data/surveys/{self.name}/manifest.json"

    @property
    def towers(self) -> list[str]:
        """The vision towers whose grids count."""
        return sorted({use["layout"]["vision_tower"] for use in self.uses.values()})

    def spec(self) -> dict[str, Any]:
        """What the step has to know."""
        return {
            "mixture": self.mixture,
            "prompt_version": self.prompt_version,
            "model_max_length": self.model_max_length,
            "code_version": CODE_VERSION,
            "uses": [self.uses[key] for key in sorted(self.uses)],
        }


def _use(experiment: Experiment, stage: str) -> dict[str, Any]:
    spec = experiment.stage(stage)
    bounds = {
        "max_mismatch_share": spec.max_mismatch_share,
        "min_supervised_share": spec.min_supervised_share,
        **spec.survey.model_dump(),
    }
    return {
        "stage": stage,
        "layout": image_layout(experiment.model, experiment.interventions),
        "bounds": bounds,
    }


def survey_name(experiment: Experiment, stage: str) -> str:
    """The folder of the survey that an experiment's stage needs."""
    spec = experiment.stage(stage)
    key = digest([spec.mixture, experiment.model.llm, spec.prompt_version, spec.model_max_length], 6)
    return f"{spec.mixture}-{spec.prompt_version}-{key}"


def survey_threads(config: Config, survey: Survey) -> int:
    """Processes that a survey can use: one where few records are expected, so that it waits for no second
    core.
    """
    mixture = config.mixtures[survey.mixture]
    parts = [
        part.expected_records or getattr(config.sources[part.annotations], "pictures", None)
        for part in mixture.parts
    ]
    known = [mixture.expected_records] if mixture.expected_records else parts
    most = STEP_JOBS["survey"].threads
    return most if None in known else max(1, min(most, sum(filter(None, known)) // RECORDS_OF_A_PROCESS))


def find_surveys(experiments: Mapping[str, Experiment]) -> dict[str, Survey]:
    """All surveys by name, in the order of the stages."""
    found: dict[str, Survey] = {}
    for stage in STAGES:
        for experiment in experiments.values():
            spec, name = experiment.stage(stage), survey_name(experiment, stage)
            made = Survey(
                name, spec.mixture, experiment.model.llm, spec.prompt_version, spec.model_max_length
            )
            use = _use(experiment, stage)
            found.setdefault(name, made).uses.setdefault(canonical_json(use), use)
    return found
