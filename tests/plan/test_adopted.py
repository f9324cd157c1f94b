"""Checkpoints that are not trained here, as experiments: how they are named, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest

from tests.support.workspace import SMALL
from workflow_scripts.config.load import load_config
from workflow_scripts.io import UserError
from workflow_scripts.plan.describe import describe_plan
from workflow_scripts.plan.plan import Plan

HUB = {"kind": "hub", "role": "checkpoint", "repo": "llava-hf/llava-1.5-7b-hf", "revision": "0123abc"}


pytestmark = pytest.mark.usefixtures("small_files")


def planned(published=None, experiment=None, **sections) -> Plan:
    """The small configuration with one more experiment, `theirs`, which is that model."""
    config = copy.deepcopy(SMALL | sections)
    config["models"]["published"] = {**HUB, **(published or {})}
    config["experiments"]["theirs"] = {"checkpoint": "published", **(experiment or {})}
    return Plan(load_config(config))


def folder_of(tmp_path, described):
    (tmp_path / "theirs").mkdir(exist_ok=True)
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(described))
    return {"kind": "path", "role": "checkpoint", "path": "theirs"}


def path_model(tmp_path, described, **changes):
    config = copy.deepcopy(SMALL)
    config["models"]["published"] = {**folder_of(tmp_path, described), **changes}
    config["experiments"]["theirs"] = {"checkpoint": "published"}
    return Plan(load_config(config))


STOCK = {"model_type": "llava", "text_config": {}, "vision_config": {}}
ORIGINAL = {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}


def test_it_is_asked_and_compared_like_the_others_which_keep_their_names():
    before, plan = Plan(load_config(copy.deepcopy(SMALL))), planned()
    assert plan.runs.items() >= before.runs.items() and plan.trainings() == before.trainings()
    assert {key: item for key, item in plan.evaluations.items() if key[0] != "theirs"} == before.evaluations
    mine = plan.evaluations["theirs", "shapes"]
    assert mine.named == "experiments/theirs/evaluation/shapes.json"
    assert mine.predict.name.startswith("llava-1.5-7b-hf-shapes-")
    assert plan.comparisons() == ["gentle", "compress_4", "theirs"]
    assert "published" in plan.used_models() and "published" not in before.used_models()


def test_it_can_be_the_baseline_and_may_choose_its_tasks():
    plan = planned(evaluation=SMALL["evaluation"] | {"baseline": "theirs"})
    assert plan.baseline == "theirs" and plan.comparisons() == ["vanilla", "gentle", "compress_4"]
    assert not planned(experiment={"tasks": []}).evaluations_of("theirs")


def test_its_name_is_that_of_its_origin_whatever_it_is_called():
    one, other = planned(), planned({"revision": "0123abd"})
    named = planned({"layers": 24, "bytes": 10**10})
    assert one.run("export", "theirs") == named.run("export", "theirs")
    assert one.run("export", "theirs").name != other.run("export", "theirs").name
    assert one.run("export", "theirs").name.startswith("llava-1.5-7b-hf-")


def test_the_original_layout_brings_its_vision_tower(tmp_path):
    plan = path_model(tmp_path, ORIGINAL, layout="llava")
    assert plan.adopted["theirs"].models == ("published", "tower")
    assert planned().adopted["theirs"].models == ("published",)


def test_a_configuration_may_train_nothing():
    plan = planned(experiments={})
    assert plan.trainings() == [] and list(plan.evaluations) == [("theirs", "shapes")]
    text = describe_plan(plan)
    assert "Nothing is trained." in text
    assert "theirs  llava-hf/llava-1.5-7b-hf at 0123abc, to be made ready" in text
    assert plan.retries == 0
    stages = copy.deepcopy(SMALL["stages"])
    stages["finetune"]["compute"] = "smal"
    with pytest.raises(UserError, match=r"stages\.finetune\.compute: found 'smal'.*did you mean 'small'"):
        planned(experiments={}, stages=stages)


@pytest.mark.parametrize(
    ("experiment", "words"),
    [
        ({"interventions": {"normalize_projector": True}}, "there is nothing for interventions to change"),
        ({"finetune": {"learning_rate": 1e-3}}, "there is nothing for finetune to change"),
        ({"model": {"llm": "llm"}}, "there is nothing for model.llm to change"),
        ({"model": {"vision_tower": "tower"}}, "nothing: published, with layout: hf, has its tower in it"),
        ({"checkpoint": "publishd"}, "did you mean 'published'?"),
        ({"checkpoint": "llm"}, "a model with role: checkpoint: published; fix: its role is llm"),
        ({"tasks": ["shape"]}, "experiments.theirs.tasks[0]: found 'shape'"),
    ],
)
def test_what_could_change_nothing_is_refused(experiment, words):
    with pytest.raises(UserError) as refused:
        planned(experiment=experiment)
    assert words in str(refused.value)


def test_a_checkpoint_is_no_part_of_a_training():
    with pytest.raises(
        UserError, match=r"model\.llm: found 'published'; allowed: a model with role: llm: llm"
    ):
        planned(model={"llm": "published", "vision_tower": "tower"})


def test_layouts_are_of_checkpoints():
    with pytest.raises(UserError, match="role: llm has one layout only"):
        planned({"role": "llm", "layout": "llava"})


@pytest.mark.parametrize(
    ("described", "layout", "words"),
    [
        (ORIGINAL, "hf", "found 'llava_llama'; allowed: a checkpoint of transformers with model_type llava"),
        (ORIGINAL, "hf", "fix: set layout: llava"),
        (STOCK, "llava", "fix: leave layout out"),
        (STOCK | {"model_type": "llava_next"}, "hf", "fix: take a LLaVA-1.5 checkpoint, or train it here"),
        ({"model_type": "llama"}, "llava", "fix: take a LLaVA checkpoint"),
    ],
)
def test_folders_of_another_layout_are_refused_when_the_configuration_is_read(
    tmp_path, described, layout, words
):
    with pytest.raises(UserError) as refused:
        path_model(tmp_path, described, layout=layout)
    assert words in str(refused.value)
