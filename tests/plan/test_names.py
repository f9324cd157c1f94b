"""Names of run folders: they must stay what they were, or every run is looked for in another place."""

from __future__ import annotations

import pytest

from llava_ext.model.interventions import FLAGS, Interventions
from tests.support.models import ALONE, flags
from workflow_scripts.config.experiments import Experiment
from workflow_scripts.plan.names import slug

WORDS = {
    "normalize_projector": "normalize",
    "use_multilayer_features": "multilayer",
    "compression_after_projection": "compress-4",
    "twoD_vision_embedding": "2d",
    "interleave": "interleave",
    "add_spatial_coordinates": "coordinates",
}


def named(interventions: Interventions) -> str:
    return slug(Experiment("mine", "", interventions, None, {}))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_has_its_word(name):
    assert named(Interventions(**ALONE[name])) == WORDS[name]


@pytest.mark.parametrize(
    ("interventions", "expected"),
    [
        (Interventions(), "vanilla"),
        (flags(*FLAGS), "normalize-multilayer-compress-2d-interleave-coordinates-4"),
        (
            flags("compression_after_projection", "interleave", published_behaviour=True),
            "compress-interleave-published_behaviour-4",
        ),
        (flags("compression_after_projection", pooling="average"), "compress-4"),
        (flags("compression_after_projection", pooling="maximum"), "compress-4-maximum"),
    ],
)
def test_flags_come_first_then_values(interventions, expected):
    assert named(interventions) == expected
