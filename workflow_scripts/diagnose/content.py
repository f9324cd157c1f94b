"""What decides the numbers of a diagnosis, checkpoint and questions' content aside.

Raise ``VERSION`` when a change gives other numbers for the same checkpoint: all are then measured anew.
"""

from __future__ import annotations

from typing import Any

from workflow_scripts.config.diagnostics import DiagnosticsSpec
from workflow_scripts.config.evaluation import TaskSpec

VERSION = 1
ASKED = ("kind", "fields", "prompt_prefix", "prompt_suffix", "permute_seed")


def content_of(spec: DiagnosticsSpec, task: TaskSpec) -> dict[str, Any]:
    """For keys and manifests: JSON values."""
    asked = task.asked()
    return {
        "looked_at": spec.looked_at(),
        "asked": {key: asked[key] for key in ASKED if key in asked},
        "version": VERSION,
    }
