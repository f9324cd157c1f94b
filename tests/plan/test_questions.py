"""Questions that are written before they are asked: their names, and the environment that writes them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from tests.support.workspace import SMALL
from workflow_scripts.config.load import load_config
from workflow_scripts.evaluate.lmms import VERSION
from workflow_scripts.io import UserError
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plan.questions import IN_CONTAINER, by_name, evaluation_python

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("small_files")


def planned(about=None, **changes) -> Plan:
    """With a task of lmms-eval beside the others."""
    config = copy.deepcopy(SMALL)
    config["evaluation"]["tasks"]["pope"] = {
        "source": "questions",
        "kind": "lmms",
        "lmms": {"task": "pope_adv", **(about or {})},
        **changes,
    }
    return Plan(load_config(config))


def test_predictions_read_what_was_written_and_other_tasks_their_source():
    plan = planned()
    name = plan.questions["pope"].name
    assert name.startswith("pope-")
    assert plan.questions_manifest("pope") == f"data/questions/{name}/manifest.json"
    assert plan.questions_manifest("shapes") == "data/sources/test/manifest.json"
    assert by_name(plan.questions.values(), name).task == "pope"
    with pytest.raises(UserError, match=f"data/questions/x belongs to no task .*there are: {name}"):
        by_name(plan.questions.values(), "x")


@pytest.mark.parametrize(
    ("about", "task", "same"),
    [
        ({"task": "pope_pop"}, {}, (False, False, False)),
        ({"files": "*.parquet"}, {}, (False, False, False)),
        ({"stratum": "category"}, {}, (False, False, False)),
        ({"prompt": {"ocr": True}}, {}, (False, False, False)),
        ({}, {"prompt_suffix": "!"}, (True, False, False)),
        ({"metric": "pope_f1_score"}, {}, (True, True, False)),
        ({"full_score": 100}, {}, (True, True, False)),
        ({}, {"batch_size": 1}, (True, True, True)),
    ],
)
def test_what_makes_new_questions_predictions_and_scores(about, task, same):
    def names(plan: Plan):
        run = plan.evaluations["vanilla", "pope"]
        return plan.questions["pope"].name, run.predict.name, run.score.name

    found = zip(names(planned()), names(planned(about, **task)), strict=True)
    assert tuple(before == after for before, after in found) == same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lmms": None}, r"kind: lmms needs lmms; fix: add lmms: \{task: NAME\}"),
        ({"metric": "yes_no"}, "metric: yes_no does not go with kind: lmms; fix: use lmms_eval"),
        ({"kind": "shapes"}, "kind: shapes takes no lmms; fix: remove it or set kind: lmms"),
        ({"lmms": None, "kind": "shapes", "metric": "lmms_eval"}, "lmms_eval does not go with kind: shapes"),
        ({"fields": {}}, "kind: lmms takes no fields"),
    ],
)
def test_what_does_not_go_together_is_named(change, message):
    with pytest.raises(UserError, match=message):
        planned(**change)


def test_the_environment_is_found_or_named(tmp_path, capsys):
    plan = planned()
    with pytest.raises(UserError, match=r"evaluation\.tasks\.pope: kind: lmms needs .* make env-evaluation"):
        evaluation_python(plan, tmp_path, "usual", in_conda=False, in_container=False)
    beside = tmp_path / ".venv-evaluation" / "bin" / "python"
    assert evaluation_python(plan, tmp_path, "usual", False, False, only_planned=True) == str(beside)
    assert "NOT INSTALLED: evaluation.tasks.pope: kind: lmms needs" in capsys.readouterr().err
    beside.parent.mkdir(parents=True)
    beside.touch()
    assert evaluation_python(plan, tmp_path, "usual", False, False) == str(beside)
    assert evaluation_python(plan, tmp_path, "usual", True, False) == "python"
    assert evaluation_python(plan, tmp_path, "usual", False, True) == IN_CONTAINER
    without = Plan(load_config(copy.deepcopy(SMALL)))
    assert evaluation_python(without, tmp_path / "nowhere", "usual", False, False) == "usual"


def test_one_release_is_installed_everywhere():
    """In the environment beside the clone, in conda and in the container, from one list."""
    pins = (ROOT / "envs/requirements-evaluation.txt").read_text().splitlines()
    assert f"lmms_eval=={VERSION}" in pins
    for name in ("Makefile", "envs/apptainer.def", "envs/evaluation.post-deploy.sh"):
        assert "requirements-evaluation.txt" in (ROOT / name).read_text()
    assert IN_CONTAINER.removesuffix("/bin/python") in (ROOT / "envs/apptainer.def").read_text()
