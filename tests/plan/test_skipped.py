"""Records that trainings leave out: no part of a run's name, and never a silent difference."""

import re
from pathlib import Path

import pytest

from tests.support.workspace import ROOT
from workflow_scripts.io import UserError, write_json
from workflow_scripts.launch.verdicts import in_config_words, settings_digest
from workflow_scripts.link import link_experiment
from workflow_scripts.plan.plan import read_plan
from workflow_scripts.plan.skipped import lines_of_others

DEMO = ROOT / "config" / "config.yaml"
MIXTURE = "shapes_pretrain"
RECORD = {"record": 12, "id": "cap_12", "source": "captions"}


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """``planned(text)``: the demo's plan with this in the place of `skip_samples`."""
    monkeypatch.chdir(tmp_path)

    def make(text=None):
        mine = tmp_path / "mine.yaml"
        mine.write_text(f"mixtures: {{{MIXTURE}: {{skip_samples: {text}}}}}\n" if text else "{}\n")
        return read_plan([DEMO, mine])

    return make


@pytest.mark.parametrize("text", ['["#12", cap_3]', '"#12, cap_3"'])
def test_they_reach_the_training_and_nothing_else(planned, text):
    before, after = planned(), planned(text)
    assert after.by_name.keys() == before.by_name.keys(), "runs keep their names"
    assert after.mixture_spec(MIXTURE) == before.mixture_spec(MIXTURE), "nothing is merged again"
    (name, *_) = after.names("pretrain")
    spec = after.training_spec("pretrain", name)
    assert spec["skip_samples"] == ["#12", "cap_3"]
    assert settings_digest(spec) != settings_digest(before.training_spec("pretrain", name))
    assert "skip_samples" not in after.training_spec("finetune", after.names("finetune")[0])
    said = in_config_words('leave it out: --skip_samples "#12"', spec)
    assert said == f'leave it out: mixtures.{MIXTURE}.skip_samples "#12"'


@pytest.mark.parametrize("text", ['["a,b"]', "[#12]", "[null]", '[" "]'])
def test_what_is_no_name_is_refused(planned, text):
    with pytest.raises(UserError, match=r"skip_samples|not valid YAML|mine\.yaml"):
        planned(text)


def test_a_shared_training_leaves_out_one_list(planned, tmp_path):
    """Two mixtures of the same content are one to trainings."""
    demo = read_plan([DEMO]).config.mixtures[MIXTURE].model_dump(mode="json", exclude_defaults=True)
    more = f"\n  twin: {demo}\nexperiments:\n  other: {{pretrain: {{mixture: twin}}}}\n"
    (tmp_path / "mine.yaml").write_text(f"mixtures:\n  {MIXTURE}: {{skip_samples: ['#1']}}{more}")
    with pytest.raises(UserError, match=r"mixtures\.twin\.skip_samples and .* share the training"):
        read_plan([DEMO, tmp_path / "mine.yaml"])


@pytest.mark.parametrize(
    ("text", "skipped", "said"),
    [
        ('["#12"]', [{"after_step": 40, "records": [RECORD]}], None),
        ("[cap_12]", [{"after_step": 40, "records": [RECORD]}], None),
        (None, [], None),
        (None, [{"after_step": 40, "records": [RECORD]}], "left out #12; .* says nothing today"),
        ('["#13"]', [{"after_step": 40, "records": [RECORD]}], "left out #12; .* says #13 today"),
        ('["#13"]', [], "left out nothing; .* says #13 today"),
        (None, [{"after_step": 0, "records": [RECORD]}, {"after_step": 9, "records": []}], None),
    ],
)
def test_a_finished_training_that_left_out_others_is_said(planned, text, skipped, said):
    plan = planned(text)
    run = plan.by_name["pretrain", plan.names("pretrain")[0]]
    write_json(Path(run.manifest), {"stage": "pretrain"} | ({"skipped": skipped} if skipped else {}))
    lines = list(lines_of_others(plan))
    assert len(lines) == (said is not None)
    if said:
        assert lines[0].endswith(f"delete {run.folder}")
        assert re.search(said, lines[0])


def test_checkpoint_json_says_what_each_stage_left_out(tmp_path):
    skipped = [{"after_step": 40, "records": [RECORD]}]
    content = {"folder": "s", "digest": "d", "step": 60, "metrics": {}, "inputs": {}}
    for name, extra in (("pretrain", {"skipped": skipped}), ("finetune", {})):
        write_json(tmp_path / name / "manifest.json", content | extra)
    write_json(tmp_path / "export/manifest.json", {"folders": {}, "loads_with": {}, "digest": "e"})
    trained = {name: tmp_path / name / "manifest.json" for name in ("pretrain", "finetune")}
    made = link_experiment({}, trained, tmp_path / "export/manifest.json", tmp_path / "e/checkpoint.json")
    assert made["training"]["pretrain"]["skipped"] == skipped
    assert "skipped" not in made["training"]["finetune"]
