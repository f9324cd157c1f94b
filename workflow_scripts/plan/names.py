"""Readable names of runs."""

from __future__ import annotations

import re
from typing import Any

from llava_ext.model.interventions import name_words
from workflow_scripts.config.experiments import Experiment


def slug(experiment: Experiment) -> str:
    """A readable beginning of a run's folder: its flags, not its experiment's name, since runs are shared."""
    return "-".join(name_words(experiment.flags)) or "vanilla"


def adopted_slug(model: Any) -> str:
    """The same for a checkpoint that is not trained here: what it is called where it comes from."""
    origin = str(getattr(model, "repo", None) or getattr(model, "path", ""))
    return re.sub(r"[^\w.-]+", "-", origin.rstrip("/").rpartition("/")[2]).strip("-.") or "checkpoint"
