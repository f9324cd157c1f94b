"""`auto` in a kind of job: the micro-batch, recomputation and offload follow from one value, `gpu_gb`."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import yaml

from tests.plan.test_memory import GB, ROOT, lora_on, peak, plan_of
from workflow_scripts.config.compute import ComputeSpec
from workflow_scripts.io import UserError
from workflow_scripts.launch.command import accumulation
from workflow_scripts.plan import memory
from workflow_scripts.plan.describe import describe_plan
from workflow_scripts.stages import STAGES


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def batches(plan):
    """Samples of a micro-batch by stage."""
    return {stage: plan.kinds["one_gpu", stage].per_device_batch_size for stage in STAGES}


@pytest.mark.parametrize("gigabytes", [80, 48, 24])
def test_one_value_gives_a_plan_that_fits(gigabytes):
    """On each card every training fits, with the global batch of the recipe, and a larger micro-batch
    would not.
    """
    plan = lora_on(gigabytes)
    for run in plan.trainings():
        compute = plan.compute(run.stage, run.name)
        assert memory.problem_of(plan, run) is None
        assert memory.needs_of(plan, run).peak < gigabytes * GB
        recipe = plan.experiments[run.experiment].stage(run.stage)
        assert accumulation(recipe, compute) * compute.per_device_batch_size == recipe.global_batch_size
    for stage, size in batches(plan).items():
        larger = lora_on(gigabytes, per_device_batch_size=2 * size)
        said = [memory.problem_of(larger, run) for run in larger.trainings() if run.stage == stage]
        assert size == 32 or any(said)


def test_smaller_cards_take_fewer_samples_at_a_time():
    large, middle, small = (batches(lora_on(gigabytes)) for gigabytes in (80, 48, 24))
    assert large["pretrain"] == 32
    assert large["finetune"] > middle["finetune"] > small["finetune"] >= 1


def test_the_plan_shows_what_it_has_come_to():
    size = batches(lora_on(24))["finetune"]
    said = f"compute.one_gpu, finetune, gpu_gb: 24: per_device_batch_size: {size}, offload: none, up to 32 of"
    assert said in describe_plan(lora_on(24))
    assert "gpu_gb: 80: " not in describe_plan(plan_of())  # all is said there, nothing is open


def test_the_launcher_gets_numbers():
    plan = lora_on(24)
    run = plan.run("finetune", "vanilla")
    spec = ComputeSpec.model_validate(plan.training_spec("finetune", run.name)["compute"])
    assert spec.per_device_batch_size == batches(plan)["finetune"]
    assert plan.training_spec("pretrain", plan.run("pretrain", "vanilla").name)["compute"] != spec


def test_the_card_names_no_other_run():
    assert lora_on(80).names("finetune") == lora_on(24).names("finetune")


def test_offload_follows_when_it_is_left_open():
    """All of 7B on cards of 48 GB: eight of them hold the optimizer, two do not."""
    many = {"gpu_gb": 48, "per_device_batch_size": "auto", "offload": "auto"}
    assert plan_of(compute={"finetune_8gpu": many}).kinds["finetune_8gpu", "finetune"].offload == "none"
    plan = plan_of(compute={"finetune_8gpu": many | {"gpus_per_node": 2}})
    assert plan.kinds["finetune_8gpu", "finetune"].offload == "optimizer"
    assert peak(plan, "finetune") < 48


def test_what_can_not_fit_is_refused_with_what_would():
    with pytest.raises(UserError) as refused:
        lora_on(12)
    said = str(refused.value)
    assert "compute.one_gpu: pretrain does not fit: it needs up to 1" in said and "gpu_gb is 12" in said
    assert said.endswith("what would fit: parallel: zero3, per_device_batch_size: 1, offload: parameters")
    lora_on(12, parallel="zero3", offload="parameters")
    lora_on(12, parallel="zero3", offload="auto")


def test_snakemake_refuses_it_too(tmp_path):
    """By its own dry run, in one line, without a traceback."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        yaml.safe_dump(
            {"extends": str(ROOT / "config/llava-v1.5-7b-lora.yaml"), "compute": {"one_gpu": {"gpu_gb": 8}}}
        )
    )
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "-n", "--configfile", mine]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "gpu_gb is 8; what would fit: " in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"per_device_batch_size": "auto"}, "gpus_per_node is 0; give a number"),
        ({"per_device_batch_size": "auto", "gpus_per_node": 1}, "set gpu_gb"),
        ({"offload": "auto", "gpus_per_node": 1}, "offload: auto follows from the GPU's memory"),
    ],
)
def test_auto_needs_a_memory_to_follow_from(values, message):
    with pytest.raises(ValueError, match=message):
        ComputeSpec.model_validate(values)


def test_models_of_unknown_size_are_asked_for():
    unknown = {"vicuna_7b": {"layers": None, "hidden_size": None}}
    with pytest.raises(UserError, match=r"state layers, hidden_size, .* or give numbers instead of auto"):
        plan_of("llava-v1.5-7b-lora", models=unknown)


def test_a_micro_batch_divides_every_experiments_step():
    """Experiments of one kind of job may have other global batches; the micro-batch divides them all."""
    other = {"experiments": {"compress_1": {"finetune": {"global_batch_size": 48}}}}
    plan = plan_of("llava-v1.5-7b-lora", **other)
    size = batches(plan)["finetune"]
    assert math.gcd(128, 48) % size == 0


def test_every_nth_of_fewer_than_n_layers_is_refused():
    """Vicuna-7B has 32: of those one could be recomputed, of 33 none."""
    assert lora_on(80, kernels={"attention": "varlen", "checkpoint_layers": 32})
    with pytest.raises(UserError, match=r"compute\.one_gpu\.kernels\.checkpoint_layers: 33: .* from 1 to 32"):
        lora_on(80, kernels={"attention": "varlen", "checkpoint_layers": 33})
