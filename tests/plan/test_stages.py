"""The register of stages is the only list: an entry, and a section of the configuration, are a new stage."""

import copy
import json
import re
import subprocess
import sys

import pytest
import yaml

from tests.support.workspace import ROOT, SMALL, Workspace, copy_code
from workflow_scripts.stages import STAGES, last_stage

ENTRY = """
STAGES["polish"] = Stage(
    name="polish", title="Stage 3: polish", purpose="Trains on a little more.", trains_llm=True, priority=3,
    parent="finetune", takes="mm_projector.safetensors",
)
"""

QUESTIONS = """
import json, sys, yaml
import workflow_scripts.stages
from workflow_scripts.stages import STAGES, Stage
{entry}
from pathlib import Path
from workflow_scripts.config.load import load_config
from workflow_scripts.plan.plan import Plan
from workflow_scripts.launch.command import Inputs, training_flags
from workflow_scripts.launch.step import complete

plan = Plan(load_config(yaml.safe_load(sys.stdin)))
run = plan.run("polish", "gentle")
spec = complete(plan.training_spec("polish", run.name))
flags = training_flags(spec, Inputs(*map(Path, "abcd")), Path("out"))
print(json.dumps({{
    "trainings": [[run.stage, run.name, run.experiment] for run in plan.trainings()],
    "runs": plan.checkpoint_spec("gentle")["runs"],
    "rate": plan.training_spec("polish", run.name)["recipe"]["learning_rate"],
    "tunes": "--tune_mm_mlp_adapter" in flags,
}}))
"""


def with_polish():
    """The small configuration with a third stage that one experiment changes."""
    config = copy.deepcopy(SMALL)
    config["sources"]["questions"] = {"kind": "shapes", "split": "questions", "pictures": 40}
    config["stages"]["polish"] = {**config["stages"]["finetune"], "learning_rate": 1e-4}
    config["experiments"] = {"vanilla": {}, "gentle": {"polish": {"learning_rate": 2e-5}}}
    return config


def test_every_stage_follows_a_parent_that_stands_before_it():
    names = list(STAGES)
    for stage in STAGES.values():
        assert stage.parent is None or names.index(stage.parent) < names.index(stage.name)
        assert (stage.parent is None) == (stage.takes is None)
    assert last_stage() == "finetune"


def test_an_entry_is_a_stage_of_the_configuration_and_of_the_plan():
    """Two experiments share the first two stages and differ in the third, which has its own recipe and
    parent.
    """
    done = subprocess.run(
        [sys.executable, "-c", QUESTIONS.format(entry=ENTRY)],
        input=yaml.safe_dump(with_polish()),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [stage for stage, _, _ in found["trainings"]] == ["pretrain", "finetune", "polish", "polish"]
    assert found["rate"] == 2e-5 and not found["tunes"]
    polish = {experiment: name for stage, name, experiment in found["trainings"] if stage == "polish"}
    assert found["runs"].keys() == {"pretrain", "finetune", "polish", "export"}
    assert found["runs"]["polish"] == polish["gentle"] != polish["vanilla"]


@pytest.mark.slow
def test_an_entry_is_a_rule_of_the_graph(tmp_path):
    """The Snakefile is left as it is: it makes a rule of the entry, between finetune and export."""
    code = copy_code(tmp_path / "code")
    with (code / "workflow_scripts/stages.py").open("a") as register:
        register.write(ENTRY)
    workspace = Workspace(tmp_path, code=code)
    workspace.config = with_polish()
    workspace.config["mixtures"]["pretrain"]["skip_samples"] = ["#12", "a b"]
    output = workspace.run("-n", "-p").stdout
    jobs = {
        stage: [job for job in workspace.planned() if job.startswith(stage)]
        for stage in ("finetune", "polish")
    }
    [finetune], polish = jobs["finetune"], jobs["polish"]
    assert len(polish) == 2
    # an empty value must not be taken for the next option
    assert sorted(re.findall(r"--skip_samples=(.*)", output)) == ["", "'#12,a b'"]
    for manifest in [job.split()[-1] for job in polish]:
        assert f"--parent {finetune.split()[-1]} --manifest {manifest}" in output
        assert f"--trained {manifest}" in output


def test_without_the_entry_the_section_is_refused_and_with_it_the_section_is_required():
    from workflow_scripts.config.load import load_config
    from workflow_scripts.io import UserError

    with pytest.raises(UserError, match=r"stages\.polish: found 'polish', and there is no such key here"):
        load_config(with_polish())
