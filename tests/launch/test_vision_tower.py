"""`train_vision_tower` in a stage's section: the flags, the tower that is handed on, the names of runs
without it.
"""

import pytest

from tests.support.workspace import ROOT
from workflow_scripts.config.stages import StageSpec
from workflow_scripts.io import digest, write_json
from workflow_scripts.launch.command import training_flags
from workflow_scripts.launch.step import prepare
from workflow_scripts.plan.plan import read_plan

TRAINED = {"train_vision_tower": True, "vision_tower_learning_rate": 2e-6}
# The names of all trainings; the fields of a tower that trains are not among what they are made of.
NAMES = {"config.yaml": "b3c8584763", "llava-v1.5-7b.yaml": "8af658c98a"}


@pytest.mark.parametrize("file", NAMES)
def test_trainings_that_leave_the_tower_frozen_keep_their_names(file):
    plan = read_plan([ROOT / "config" / file])
    names = sorted(run.name for run in plan.runs.values() if run.stage in ("pretrain", "finetune"))
    assert digest(names, 10) == NAMES[file]


def written(place, files=(), **content):
    write_json(place / "manifest.json", {"digest": place.name, "files": list(files), **content})
    return place / "manifest.json"


@pytest.mark.parametrize("changes", [{}, TRAINED])
def test_stage_2_begins_with_the_tower_that_stage_1_trained(changes, tmp_path):
    plan = read_plan([ROOT / "config/config.yaml"])
    spec = plan.training_spec("finetune", plan.run("finetune", "vanilla").name)
    spec["recipe"] |= changes
    models = [written(tmp_path / role, role=role, folder="model") for role in ("llm", "vision_tower")]
    mixture, child = written(tmp_path / "mixture"), tmp_path / "child/manifest.json"

    def job(*files):
        return prepare(spec, mixture, models, written(tmp_path / "parent", files, folder="state"), child)

    assert job("mm_projector.bin").inputs.vision_tower == tmp_path / "vision_tower/model"
    both = job("mm_projector.bin", "vision_tower/config.json")
    assert both.inputs.vision_tower == tmp_path / "parent/state/vision_tower"
    flags = training_flags(both.spec, both.inputs, tmp_path)
    on = [
        (flag, flags[flags.index(flag) + 1]) for flag in flags if "vision_tower" in flag and "--" in flag[:2]
    ]
    expected = [("--train_vision_tower", "True"), ("--vision_tower_lr", "2e-06")] if changes else []
    assert [pair for pair in on if pair[0] != "--vision_tower"] == expected


def test_a_rate_for_a_frozen_tower_is_refused():
    with pytest.raises(ValueError, match=r"vision_tower_learning_rate: found 2e-06, but the tower does not"):
        StageSpec(
            mixture="m",
            compute="c",
            prompt_version="v1",
            learning_rate=1e-5,
            epochs=1,
            global_batch_size=8,
            vision_tower_learning_rate=2e-6,
        )
