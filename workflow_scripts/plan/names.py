"""Readable names of runs."""

from __future__ import annotations

from llava_ext.model.interventions import name_words
from workflow_scripts.config.experiments import Experiment


def slug(experiment: Experiment) -> str:
    """A readable beginning of a run's folder: its flags, not its experiment's name, since runs are shared."""
    return "-".join(name_words(experiment.flags)) or "vanilla"
