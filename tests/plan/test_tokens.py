"""Tokens and hours of the plan: from the survey, and from trainings that are finished here."""

import copy
import json
from pathlib import Path

import pytest
import yaml

from workflow_scripts.config.load import load_config
from workflow_scripts.io import write_json
from workflow_scripts.plan.describe import describe_plan, jobs_of
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plan.tokens import flops_of
from workflow_scripts.survey.layout import image_layout

ROOT = Path(__file__).parents[2]
FULL = yaml.safe_load((ROOT / "config/llava-v1.5-7b.yaml").read_text())


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Two experiments of the full configuration, of which only stage 2 has been surveyed."""
    monkeypatch.chdir(tmp_path)
    raw = copy.deepcopy(FULL)
    raw["experiments"] = {name: raw["experiments"][name] for name in ("vanilla", "compress_1")}
    plan = Plan(load_config(raw))
    layouts = [
        {
            "of": [image_layout(experiment.model, experiment.interventions)],
            "all": {
                "samples": 1000,
                "tokens": tokens,
                "length": {"longest": 900},
                "labels": 50_000,
                "with_picture": 1000,
            },
            "histogram": {"edges": [0, 600, 1200], "text_only": [0, 0], "with_picture": [300, 700]},
        }
        for experiment, tokens in zip(plan.experiments.values(), (900_000, 300_000), strict=True)
    ]
    write_json(Path(plan.survey_of("finetune", plan.names("finetune")[0]).manifest), {"layouts": layouts})
    return plan


def job(plan, stage, experiment):
    return next(job for job in jobs_of(plan) if job.run.stage == stage and experiment in job.experiments)


def finish(run, *speeds, **more):
    """A finished training with these speeds in its log, and what else its lines have."""
    state = Path(run.folder) / "state"
    state.mkdir(parents=True)
    rows = [
        {"step": step, "loss": 1.0, "tokens_per_s": speed, **more} for step, speed in enumerate(speeds, 1)
    ]
    (state / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(Path(run.manifest), {"folder": "state", "skipped": []})


def test_tokens_of_an_epoch_are_those_of_the_survey(plan):
    assert job(plan, "finetune", "vanilla").tokens == 900_000
    assert job(plan, "finetune", "compress_1").tokens == 300_000
    assert job(plan, "pretrain", "vanilla").tokens is None


def test_without_a_finished_training_the_hours_are_those_of_the_configuration(plan):
    found = job(plan, "finetune", "compress_1")
    assert (found.hours, found.is_measured) == (10, False)
    assert "from the survey's tokens" not in describe_plan(plan)


def test_a_finished_training_says_how_long_the_others_take(plan):
    finish(plan.run("finetune", "vanilla"), 10, 50, 100)
    found = job(plan, "finetune", "compress_1")
    assert found.is_measured and found.hours == pytest.approx(300_000 / 50 / 3600)
    assert found.gpu_hours == pytest.approx(8 * found.hours)
    text = describe_plan(plan)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert any(line.endswith("0.30 1.7* 13.3 compress_1") for line in lines)
    assert any(line.endswith("0.90 done vanilla") for line in lines)
    assert "3 of 4 trainings are to be done, about 9 hours one after the other, 69 GPU hours" in text
    assert "* from the survey's tokens, at the speed of trainings that are finished here" in text
    assert not job(plan, "pretrain", "compress_1").is_measured


def test_steps_see_the_mean_of_the_samples(plan):
    raw = copy.deepcopy(FULL)
    raw["experiments"] = {"vanilla": {"finetune": {"max_steps": 10}}}
    assert job(Plan(load_config(raw)), "finetune", "vanilla").tokens == 10 * 128 * 900


def test_hours_follow_from_operations_where_they_were_measured(plan):
    """One vision token instead of 576: a third of the tokens, but the tower's work stays."""
    finish(plan.run("finetune", "vanilla"), 50, tflop_per_s=400.0)
    found, work = job(plan, "finetune", "compress_1"), flops_of(plan, plan.run("finetune", "compress_1"))
    assert found.hours == pytest.approx(work / 400e12 / 8 / 3600) and found.is_measured
    assert work > 300_000 / 900_000 * flops_of(plan, plan.run("finetune", "vanilla"))


def test_another_kind_of_job_on_the_same_card_is_computed_from_it(plan):
    """Two cards of 80 GB take four times the hours of eight."""
    finish(plan.run("finetune", "vanilla"), 50, tflop_per_s=400.0)
    raw = copy.deepcopy(FULL)
    raw["compute"]["two"] = raw["compute"]["finetune_8gpu"] | {"gpus_per_node": 2}
    raw["experiments"] = {
        "vanilla": {},
        "compress_1": {**FULL["experiments"]["compress_1"], "finetune": {"compute": "two"}},
    }
    eight, two = job(plan, "finetune", "compress_1"), job(Plan(load_config(raw)), "finetune", "compress_1")
    assert two.is_measured and two.hours == pytest.approx(4 * eight.hours)
    assert two.gpu_hours == pytest.approx(eight.gpu_hours)
