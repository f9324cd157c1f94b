"""Which predictions and scores a configuration asks for: new ones where a change changes the result."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from tests.support.workspace import SMALL
from workflow_scripts.config.load import load_config
from workflow_scripts.evaluate import harness
from workflow_scripts.io import UserError, write_json
from workflow_scripts.plan.checks import check_targets
from workflow_scripts.plan.plan import Plan

pytestmark = pytest.mark.usefixtures("small_files")


def planned(change=lambda config: None) -> Plan:
    config = copy.deepcopy(SMALL)
    change(config)
    return Plan(load_config(config))


def task(**changes):
    """A change of the task's section."""
    return lambda config: config["evaluation"]["tasks"]["shapes"].update(changes)


def renamed(plan: Plan, stage: str) -> set[str]:
    """The experiments whose run of the stage is another than before."""
    before = planned().evaluations
    return {
        name
        for (name, _), item in plan.evaluations.items()
        if getattr(item, stage).name != getattr(before[name, "shapes"], stage).name
    }


EVERY = {"vanilla", "gentle", "compress_4"}


@pytest.mark.parametrize(
    ("change", "predictions", "scores"),
    [
        (task(prompt_suffix="\nAnswer shortly."), EVERY, EVERY),
        (task(conditions={"permuted": 3}), EVERY, EVERY),
        (task(pictures=5), EVERY, EVERY),
        (task(max_new_tokens=9), EVERY, EVERY),
        (task(metric="yes_no"), set(), EVERY),
        (task(max_unparsed_share=1.0), set(), EVERY),
        (task(examples=3), set(), EVERY),
        (task(batch_size=1), set(), set()),
        (task(shards=4, runtime_min=5), set(), set()),
        (lambda config: config["evaluation"].update(resamples=500), set(), EVERY),
        (lambda config: config["evaluation"].update(baseline="gentle"), set(), set()),
        (lambda config: config["sources"]["test"].update(seed=9), EVERY, EVERY),
        (
            lambda config: config["experiments"]["gentle"]["finetune"].update(learning_rate=2e-3),
            {"gentle"},
            {"gentle"},
        ),
    ],
)
def test_what_is_predicted_and_scored_anew(change, predictions, scores):
    plan = planned(change)
    assert renamed(plan, "predict") == predictions
    assert renamed(plan, "score") == scores
    trainings = {run.name for run in planned().trainings()}
    if predictions in (EVERY, set()):
        assert {run.name for run in plan.trainings()} == trainings


def test_another_harness_predicts_anew(monkeypatch):
    before = planned()
    monkeypatch.setattr(harness, "VERSION", harness.VERSION + 1)
    after = planned()
    names = [{item.predict.name for item in plan.evaluations.values()} for plan in (before, after)]
    assert not names[0] & names[1]


def test_experiments_choose_their_tasks():
    def change(config):
        config["evaluation"]["tasks"]["short"] = {"source": "test", "pictures": 2}
        config["experiments"]["gentle"]["tasks"] = ["short"]
        config["experiments"]["compress_4"]["tasks"] = []

    plan = planned(change)
    asked = {name: [item.task for item in plan.evaluations_of(name)] for name in plan.experiments}
    assert asked == {"vanilla": ["shapes", "short"], "gentle": ["short"], "compress_4": []}
    assert plan.comparisons() == ["gentle"]
    assert {item.named for item in plan.evaluations_of("gentle")} == {
        "experiments/gentle/evaluation/short.json"
    }
    assert "test" in plan.used_sources()


def test_the_baseline_is_the_first_experiment_or_the_chosen_one():
    assert planned().baseline == "vanilla"
    chosen = planned(lambda config: config["evaluation"].update(baseline="gentle"))
    assert chosen.baseline == "gentle" and chosen.comparisons() == ["vanilla", "compress_4"]


def test_without_an_evaluation_nothing_is_asked():
    plan = planned(lambda config: config.pop("evaluation"))
    assert not plan.evaluations and not plan.comparisons() and "test" not in plan.used_sources()


def test_finished_predictions_keep_their_shards():
    """Another number of shards is about jobs that are done."""
    plan = planned(task(shards=3))
    run = plan.evaluations["vanilla", "shapes"].predict
    assert plan.shard_files(run.name) == [f"{run.folder}/shard-{i}-of-3.json" for i in range(3)]
    write_json(Path(run.folder) / "shards.json", {"shards": 1})
    assert len(plan.shard_files(run.name)) == 3, "not finished: the new number counts"
    write_json(Path(run.manifest), {})
    assert plan.shard_files(run.name) == []


def test_targets_that_nobody_is_asked_are_named_with_the_tasks():
    check_targets(
        planned(), ["experiments/gentle/evaluation/shapes.json", "experiments/gentle/comparison.json"]
    )
    with pytest.raises(
        UserError, match=r"gentle is not asked 'shape'; tasks: shapes; did you mean 'shapes'\?"
    ):
        check_targets(planned(), ["experiments/gentle/evaluation/shape.json"])
    with pytest.raises(UserError, match="no experiment is called 'gentl'"):
        check_targets(planned(), ["experiments/gentl/evaluation/shapes.json"])
    with pytest.raises(UserError, match="vanilla is the baseline"):
        check_targets(planned(), ["experiments/vanilla/comparison.json"])
