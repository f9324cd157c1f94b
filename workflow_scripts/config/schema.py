"""The whole configuration: its sections."""

from __future__ import annotations

from pydantic import Field, field_validator

from workflow_scripts.config.base import StrictModel
from workflow_scripts.config.compute import ComputeSpec
from workflow_scripts.config.diagnostics import DiagnosticsSpec
from workflow_scripts.config.evaluation import EvaluationSpec
from workflow_scripts.config.experiments import ExperimentSpec
from workflow_scripts.config.mixtures import MixtureSpec
from workflow_scripts.config.models import ModelSection, ModelSpec
from workflow_scripts.config.stages import Stages
from workflow_scripts.config.types import Name
from workflow_scripts.sources import SourceSpec


class Config(StrictModel):
    """A configuration file, read by `snakemake --configfile`. Relative paths are relative to the working
    folder.
    """

    extends: str | list[str] | None = None
    """Another configuration file, relative to this one, that this one changes: sections are merged, values
    replaced; an experiment, source, mixture, model or kind of job that is null is taken away. Of several
    files, which may be fragments such as `benchmarks.yaml`, later ones are merged into earlier ones.
    """
    sources: dict[Name, SourceSpec]
    """Where images and annotations come from, by name."""
    mixtures: dict[Name, MixtureSpec]
    """What is trained on: annotations joined with the images of sources, by name."""
    models: dict[Name, ModelSpec]
    """Language models and vision towers, by name."""
    model: ModelSection
    """The models of every experiment that says nothing else."""
    compute: dict[Name, ComputeSpec]
    """Kinds of jobs, by name."""
    stages: Stages
    """The training stages."""
    experiments: dict[Name, ExperimentSpec] = Field(min_length=1)
    """What is trained, by name: each becomes `experiments/<name>/checkpoint.json`."""
    evaluation: EvaluationSpec | None = None
    """What is measured on the finished checkpoints; left out, nothing is."""
    diagnostics: DiagnosticsSpec | None = None
    """What is looked at inside the finished checkpoints, with the evaluation's questions; left out, nothing
    is. `{}` means all that there is.
    """
    python: str | None = None
    """The interpreter of the jobs. Left out: the one that runs Snakemake, or `python` inside conda and
    containers.
    """
    python_evaluation: str | None = None
    """The interpreter that has lmms-eval, for tasks of `kind: lmms`. Left out: that of `make env-evaluation`,
    or of the conda environment and the container.
    """
    setup: str = ""
    """Shell commands on one line that run before every step, inside its job (and its container): `module
    load cuda/12.4`. For the profile of a site, see docs/slurm.md; a change reruns nothing.
    """

    @field_validator("setup")
    @classmethod
    def _safe_in_shells(cls, value: str) -> str:
        """Snakemake passes it to jobs through YAML and two shells, which would change it without a word."""
        found = sorted(set(value) & set("'\"$`\\\n"))
        if found:
            raise ValueError(
                f"{value!r} has {' '.join(map(repr, found))}: quotes, $, ` and \\ and line breaks don't reach"
                " a job as they are; write the commands into a file and set setup to: source FILE"
            )
        return value
