"""Which surveys a configuration asks for, and which trainings share one."""

import copy
from pathlib import Path

import yaml

from workflow_scripts.config.load import load_config
from workflow_scripts.plan.plan import Plan, read_plan
from workflow_scripts.plan.surveys import survey_threads
from workflow_scripts.stages import STAGES

ROOT = Path(__file__).parents[2]
FULL = yaml.safe_load((ROOT / "config/llava-v1.5-7b.yaml").read_text())


def plan(**experiments):
    raw = copy.deepcopy(FULL)
    raw["experiments"] = experiments or raw["experiments"]
    return Plan(load_config(raw))


def layouts(survey):
    return [use["layout"]["flags"] for use in survey.spec()["uses"]]


def test_one_survey_a_stage_serves_all_experiments_of_the_shipped_configuration():
    found = plan()
    stage_1, stage_2 = found.surveys.values()
    assert (stage_1.mixture, stage_2.mixture) == ("llava_558k", "llava_665k")
    assert stage_2.name.startswith("llava_665k-v1-")
    assert {size.get("final_spatial_size") for size in layouts(stage_2)} == {None, 1, 4, 16, 64}
    assert len(layouts(stage_2)) == 5
    for run in found.trainings():
        assert (
            found.survey_of(run.stage, run.name)
            is found.surveys[[*found.surveys][[*STAGES].index(run.stage)]]
        )


def test_what_changes_no_token_changes_no_survey():
    vanilla = {"description": "as it is"}
    alone = plan(vanilla=vanilla)
    normalized = {"interventions": {"normalize_projector": True, "use_multilayer_features": True}}
    faster = {"finetune": {"learning_rate": 1e-4, "seed": 1}, "pretrain": {"epochs": 2}}
    more = plan(vanilla=vanilla, normalized=normalized, faster=faster)
    assert {name: item.spec() for name, item in alone.surveys.items()} == {
        name: item.spec() for name, item in more.surveys.items()
    }


def test_what_changes_tokens_is_another_layout_or_another_survey():
    interleaved = {"interventions": {"interleave": True, "interleave_sparsity": 8}}
    shorter = {"finetune": {"model_max_length": 1024}}
    found = plan(vanilla={}, interleaved=interleaved, shorter=shorter)
    assert [item.model_max_length for item in found.surveys.values()] == [2048, 2048, 1024]
    _, stage_2, short = found.surveys.values()
    assert {"interleave": True, "interleave_sparsity": 8} in layouts(stage_2) and layouts(short) == [{}]


def test_each_bound_of_an_experiment_is_looked_at():
    found = plan(vanilla={}, tolerant={"finetune": {"survey": {"max_cut_share": 0.5}}})
    uses = [*found.surveys.values()][1].spec()["uses"]
    assert [use["bounds"]["max_cut_share"] for use in uses] == [0.1, 0.5]


def test_a_small_mixture_asks_for_one_core():
    demo, full = read_plan([ROOT / "config/config.yaml"]), plan()
    assert [survey_threads(demo.config, item) for item in demo.surveys.values()] == [1, 1]
    assert [survey_threads(full.config, item) for item in full.surveys.values()] == [8, 8]
    raw = copy.deepcopy(FULL)
    del raw["mixtures"]["llava_665k"]["parts"][0]["expected_records"]
    raw["mixtures"]["llava_558k"]["parts"][0]["weight"] = 0.1
    raw["mixtures"]["llava_558k"]["expected_records"] = 55_813
    found = Plan(load_config(raw))
    assert [survey_threads(found.config, item) for item in found.surveys.values()] == [2, 8]
