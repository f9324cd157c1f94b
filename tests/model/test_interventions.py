"""The flags themselves: what they mean, which values are refused, and what the messages say."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys

import pytest

from llava_ext.model.configuration_spatial_llava import SpatialLlavaConfig
from llava_ext.model.interventions import (
    DEFAULTS,
    FLAGS,
    GRID_FLAGS,
    PUBLISHED_CONFLICTS,
    ROLES,
    InterventionError,
    Interventions,
    Role,
    _flag,
)
from tests.support.models import ALONE, flags, make_model


def test_defaults_are_vanilla():
    assert Interventions().is_vanilla
    assert not Interventions().problems(24, 24)
    assert Interventions().tokens_per_image(24) == 576


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"compression_after_projection": True}, "final_spatial_size: missing"),
        ({"compression_after_projection": True, "final_spatial_size": 15}, "no square number"),
        (
            {"compression_after_projection": True, "final_spatial_size": 25},
            "5 does not divide the vision tower's grid side 24",
        ),
        ({"compression_after_projection": True, "final_spatial_size": 1024}, "32 does not divide"),
        ({"compression_after_projection": True, "final_spatial_size": 0}, "positive whole numbers"),
        ({"compression_after_projection": True, "final_spatial_size": True}, "positive whole numbers"),
        ({"final_spatial_size": 16}, "without compression_after_projection"),
        ({"interleave_sparsity": 4}, "without interleave"),
        ({"interleave": True, "interleave_sparsity": 0}, "whole numbers from 1"),
        ({"interleave": True, "interleave_sparsity": 577}, "an image has only 576"),
        (
            {"interleave": True, "compression_after_projection": True, "final_spatial_size": 1},
            "an image has only 1",
        ),
        ({"use_multilayer_features": True, "multilayer_layers": (12, 25)}, "1 to 24"),
        ({"use_multilayer_features": True, "multilayer_layers": ()}, "one or more different layers"),
        ({"use_multilayer_features": True, "multilayer_layers": (3, 3)}, "different layers"),
        ({"multilayer_layers": (1, 2)}, "without use_multilayer_features"),
        ({"normalize_statistics": "auto"}, "without normalize_projector"),
        (
            {"normalize_projector": True, "normalize_statistics": "mean"},
            "`vicuna-7b`, `auto`, or two positive numbers",
        ),
        ({"normalize_projector": True, "normalize_statistics": "1.2"}, "two positive numbers"),
        ({"normalize_projector": True, "projector_max_norm": 1.0}, "give both"),
        (
            {"normalize_projector": True, "projector_max_norm": -1.0, "projector_scale": 1.0},
            "must be positive",
        ),
        (
            {"twoD_vision_embedding": True, "compression_after_projection": True, "final_spatial_size": 1},
            "no effect with one vision token",
        ),
        ({"published_behaviour": True}, "no effect without an intervention"),
    ],
)
def test_wrong_values_are_named_with_the_fix(values, expected):
    with pytest.raises(InterventionError, match="(?s)" + expected):
        Interventions(**values).validate(24, 24)


OTHER_VALUES = {
    "normalize_statistics": "auto",
    "projector_max_norm": 1.0,
    "projector_scale": 1.0,
    "multilayer_layers": (1, 2),
    "final_spatial_size": 4,
    "pooling": "maximum",
    "interleave_sparsity": 2,
}


def test_fields_are_flags_their_values_or_the_switch():
    values = {name for name, role in ROLES.items() if role.flag}
    assert values == OTHER_VALUES.keys()
    assert set(ROLES) == values | set(FLAGS) | {"published_behaviour"}
    assert {ROLES[name].flag for name in values} <= set(FLAGS)
    assert set(FLAGS) - set(GRID_FLAGS) == {"normalize_projector", "use_multilayer_features"}


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_value_without_its_flag_is_refused(name):
    flag = ROLES[name].flag
    found = Interventions(**{name: OTHER_VALUES[name]}).problems()
    assert any(
        line.startswith(f"{name}: found ")
        and f"without {flag}, so it has no effect; add {flag}: true" in line
        for line in found
    )
    assert not any("without" in line for line in Interventions(**{flag: True}).problems())


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_value_counts_only_with_its_flag(name):
    other = {name: OTHER_VALUES[name]}
    assert not Interventions(**other).differences(Interventions())
    flag = {ROLES[name].flag: True}
    if name in ("projector_max_norm", "projector_scale"):  # only both together are the statistics
        other = {"projector_max_norm": 1.0, "projector_scale": 1.0}
    expected = "projector_max_norm" if name == "normalize_statistics" else name
    lines = Interventions(**flag, **other).differences(Interventions(**flag))
    assert expected in {line.split(":")[0] for line in lines}


def test_recent_fields_leave_old_records_as_they_were():
    """Checkpoints, run identities and configs from before `pooling` existed say the same as today's."""
    before = {name for name in DEFAULTS if not ROLES[name].is_recent}
    assert len(before) == 13 and flags(*FLAGS).to_dict().keys() == before
    assert Interventions.from_mapping(flags(*FLAGS).to_dict()).pooling == "average"
    changed = flags("compression_after_projection", pooling="maximum")
    assert changed.to_dict()["pooling"] == "maximum"
    assert flags("compression_after_projection").differences(changed) == [
        "pooling: 'average' against 'maximum'"
    ]


@pytest.mark.parametrize("name", FLAGS)
def test_a_later_flag_is_not_recorded_while_it_is_off(name, monkeypatch, tmp_path):
    monkeypatch.setitem(ROLES, name, dataclasses.replace(ROLES[name], is_recent=True))
    assert name not in Interventions().to_dict()
    assert flags(name).to_dict()[name] is True
    for chosen in (Interventions(), flags(name)):
        config = make_model(chosen)[0].config
        config.save_pretrained(tmp_path)
        assert (name in json.loads((tmp_path / "config.json").read_text())) is getattr(chosen, name)
        assert SpatialLlavaConfig.from_pretrained(tmp_path).interventions == config.interventions


def test_a_flag_says_itself_that_it_came_later():
    made = _flag("word", "What it does.", is_recent=True)
    assert made.metadata["role"] == Role(is_flag=True, short="word", is_recent=True)
    assert not any(ROLES[name].is_recent for name in FLAGS)


def test_the_published_code_has_one_pooling():
    chosen = flags("compression_after_projection", pooling="maximum", published_behaviour=True)
    assert any(
        "pooling: found 'maximum', but the published code has only average" in line
        for line in chosen.problems()
    )


def test_all_problems_come_at_once():
    found = Interventions(final_spatial_size=4, interleave_sparsity=2).problems()
    assert len(found) == 2


@pytest.mark.parametrize("side", [1, 2, 3, 4, 6, 8, 12, 24])
def test_final_spatial_size_counts_tokens(side):
    chosen = Interventions(compression_after_projection=True, final_spatial_size=side * side)
    chosen.validate(24, 24)
    assert chosen.tokens_per_image(24) == side * side


def test_published_behaviour_takes_the_side():
    chosen = Interventions(compression_after_projection=True, final_spatial_size=16, published_behaviour=True)
    assert chosen.tokens_per_image(24) == 256


def test_published_behaviour_ignores_sparsity_and_grid():
    described = Interventions(interleave=True, interleave_sparsity=2)
    published = Interventions(interleave=True, interleave_sparsity=2, published_behaviour=True)
    assert (described.sparsity, published.sparsity) == (2, 4)
    assert described.coordinates(5, 4) == (1, 1)
    assert published.coordinates(5, 4) == (0, 5)


@pytest.mark.parametrize("pair", itertools.combinations(FLAGS, 2), ids="+".join)
def test_every_pair_works_as_described(pair):
    assert not flags(*pair).problems(4, 24)


@pytest.mark.parametrize("pair", itertools.combinations(FLAGS, 2), ids="+".join)
def test_every_pair_of_the_published_code_works_or_is_refused(pair):
    sides = {"final_spatial_size": 2} if "compression_after_projection" in pair else {}
    problems = flags(*pair, published_behaviour=True, **sides).problems(4, 24)
    conflict = tuple(pair) in PUBLISHED_CONFLICTS or tuple(reversed(pair)) in PUBLISHED_CONFLICTS
    assert bool(problems) == conflict
    if conflict:
        assert all(name in problems[0] for name in pair)
        assert "published_behaviour: false" in problems[0]


@pytest.mark.parametrize("name", FLAGS)
def test_flags_that_need_a_grid_are_refused_with_the_cls_token(name):
    needs_grid = name not in ("normalize_projector", "use_multilayer_features")
    assert bool(flags(name).problems(4, 24, keeps_cls=True)) == needs_grid


def test_json_round_trip_and_unknown_keys():
    chosen = flags(*FLAGS)
    assert Interventions.from_mapping(chosen.to_dict()) == chosen
    with pytest.raises(InterventionError, match="unknown key 'normalise_projector'"):
        Interventions.from_mapping({"normalise_projector": True})


def test_differences_name_the_keys_that_change_the_model():
    one, other = flags("normalize_projector"), flags("use_multilayer_features")
    assert {line.split(":")[0] for line in one.differences(other)} >= {
        "normalize_projector",
        "use_multilayer_features",
    }
    assert not Interventions(interleave=True).differences(
        Interventions(interleave=True, interleave_sparsity=4)
    )
    assert Interventions(interleave=True).differences(Interventions(interleave=True, interleave_sparsity=2))


def test_statistics_are_numbers_or_names():
    assert Interventions(normalize_projector=True).fixed_statistics() == (1.22, 0.83)
    assert Interventions(normalize_projector=True, normalize_statistics="0.9,1").fixed_statistics() == (
        0.9,
        1.0,
    )
    assert Interventions(normalize_projector=True, normalize_statistics="auto").fixed_statistics() is None


def test_the_module_is_plain_python():
    """The Snakefile's config schema imports it at parse time."""
    code = (
        "import sys, llava_ext.model.interventions; print(sorted({'torch', 'transformers', 'numpy',"
        " 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_is_a_section_of_a_pydantic_model():
    import pydantic

    class Section(pydantic.BaseModel):
        interventions: Interventions = Interventions()

    assert Section.model_validate({"interventions": dict(ALONE["interleave"])}).interventions.sparsity == 2
    with pytest.raises(pydantic.ValidationError, match="interleaves"):
        Section.model_validate({"interventions": {"interleaves": True}})
    fields = Section.model_json_schema()["$defs"]["Interventions"]["properties"]
    assert all(fields[name]["description"] for name in fields)
