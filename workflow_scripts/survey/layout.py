"""What decides which tokens stand for an image, apart from the language model. Imports nothing heavy."""

from __future__ import annotations

from typing import Any

from llava_ext.model.interventions import Interventions
from workflow_scripts.config.models import ModelSection


def image_layout(model: ModelSection, interventions: Interventions) -> dict[str, Any]:
    """Equal for trainings whose images take the same tokens, as far as the configuration says it."""
    return {
        "vision_tower": model.vision_tower,
        "vision_feature_select": model.vision_feature_select,
        "flags": interventions.in_sequence(),
    }
