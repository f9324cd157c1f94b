"""What a GPU needs, in the plan: before anything is downloaded, and what would fit instead."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from workflow_scripts.config.load import load_config
from workflow_scripts.plan import memory
from workflow_scripts.plan.describe import describe_plan
from workflow_scripts.plan.plan import Plan, read_plan
from workflow_scripts.plan.sizes import sizes_of

ROOT = Path(__file__).parents[2]
GB = 1e9


def plan_of(name="llava-v1.5-7b", **sections):
    """The plan of a shipped configuration with some values of `compute` and `stages` changed."""
    base = read_plan([ROOT / f"config/{name}.yaml"]).config.model_dump(mode="json", exclude_unset=True)
    raw = copy.deepcopy(base)
    for section, changes in sections.items():
        for key, values in changes.items():
            raw[section][key].update(values)
    raw.pop("extends", None)
    return Plan(load_config(raw))


def peak(plan, stage, experiment="vanilla"):
    return memory.needs_of(plan, plan.run(stage, experiment)).peak / GB


@pytest.mark.parametrize(
    ("name", "room"), [("llava-v1.5-7b", 80), ("llava-v1.5-7b-lora", 80), ("llava-v1.5-7b-quick", 24),
                       ("llava-v1.5-13b", 80)]
)  # fmt: skip
def test_the_shipped_configurations_fit_their_cards(name, room, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = plan_of(name)
    for run in plan.trainings():
        assert memory.problem_of(plan, run) is None
        assert 0 < memory.needs_of(plan, run).peak < room * GB
    assert "GB a GPU" in describe_plan(plan) and "NOT ENOUGH: pre" not in describe_plan(plan)


def test_stage_1_is_near_what_was_measured(tmp_path, monkeypatch):
    """24.1 GB (22.4 GiB) with micro-batches of 32 times 589 tokens; captions may have some more."""
    monkeypatch.chdir(tmp_path)
    assert peak(plan_of(), "pretrain") == pytest.approx(24.1, rel=0.15)


def test_fewer_vision_tokens_need_less(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = plan_of()
    assert (
        peak(plan, "pretrain", "compress_1") < peak(plan, "pretrain", "compress_64") < peak(plan, "pretrain")
    )


def test_what_does_not_fit_is_said_with_what_would(tmp_path, monkeypatch):
    """7B in full on one machine of 8 cards of 24 GB: not by batches alone."""
    monkeypatch.chdir(tmp_path)
    plan = plan_of(compute={"finetune_8gpu": {"gpu_gb": 24}})
    said = memory.problem_of(plan, plan.run("finetune", "vanilla"))
    assert "compute.finetune_8gpu has gpu_gb: 24" in said
    assert "what would fit: per_device_batch_size: " in said
    assert f"NOT ENOUGH: {said}" in describe_plan(plan)
    assert "compute.pretrain_8gpu" not in describe_plan(plan)


def test_what_is_proposed_fits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = memory.problem_of(*on_24(lora_on(24, per_device_batch_size=16)))
    size = int(said.rpartition("per_device_batch_size: ")[2])
    assert size in (1, 2, 4)
    assert memory.problem_of(*on_24(lora_on(24, per_device_batch_size=size))) is None
    assert memory.problem_of(*on_24(lora_on(24, per_device_batch_size=2 * size))) is not None


def lora_on(gigabytes, **values):
    return plan_of("llava-v1.5-7b-lora", compute={"one_gpu": {"gpu_gb": gigabytes, **values}})


def on_24(plan):
    return plan, plan.run("finetune", "vanilla")


def test_no_number_of_small_cards_is_proposed_where_none_fits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = {"gpu_gb": 1, "per_device_batch_size": 1, "parallel": "zero3", "gpus_per_node": 1}
    plan = plan_of(compute={"finetune_8gpu": tiny | {"offload": "parameters"}})
    assert "more GPUs, or GPUs with more memory (gpu_gb: " in memory.problem_of(*on_24(plan))


def test_a_prepared_model_says_its_sizes_itself(tmp_path, monkeypatch):
    """Two key and value heads instead of 32: less to train, and the file is believed."""
    monkeypatch.chdir(tmp_path)
    before = sizes_of_vanilla(plan_of()).decoder
    folder = tmp_path / "models/vicuna_7b/model"
    folder.mkdir(parents=True)
    (folder.parent / "manifest.json").write_text(json.dumps({"folder": "model"}))
    content = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000,
               "num_attention_heads": 32, "num_key_value_heads": 2}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content))
    after = sizes_of_vanilla(plan_of()).decoder
    assert before.weights - after.weights == 32 * 2 * 4096 * (4096 - 256)


def sizes_of_vanilla(plan):
    return sizes_of(plan.config, plan.experiments["vanilla"])


def test_what_is_not_known_is_not_said(tmp_path, monkeypatch):
    """No sizes, or no GPU: no number."""
    monkeypatch.chdir(tmp_path)
    unknown = {"layers": None, "hidden_size": None}
    assert memory.needs_of(*on_24(plan_of(models={"vicuna_7b": unknown}))) is None
    demo = read_plan([ROOT / "config/config.yaml"])
    assert memory.needs_of(demo, demo.run("finetune", "vanilla")) is None
    assert "GB a GPU" not in describe_plan(demo)
