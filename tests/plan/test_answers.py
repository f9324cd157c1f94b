"""What the plan says answers and diagnoses take: before anything was asked, and by what was asked here."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from tests.support.workspace import SMALL
from workflow_scripts.config.load import load_config
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.evaluate.pace import note_pace
from workflow_scripts.io import write_json
from workflow_scripts.plan.answers import Prices, asked_of
from workflow_scripts.plan.describe import describe_plan
from workflow_scripts.plan.needs import converted_bytes, disk_needs
from workflow_scripts.plan.plan import Plan, read_plan

ROOT = Path(__file__).parents[2]
FULL = read_yaml(ROOT / "config/llava-v1.5-7b.yaml")
ASKED = "two_d_shapes"


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Makes plans of two experiments of the full configuration, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def make(**task) -> Plan:
        raw = copy.deepcopy(FULL)
        raw["experiments"] = {name: raw["experiments"][name] for name in ("vanilla", "compress_1")}
        raw["evaluation"]["tasks"][ASKED] |= task
        return Plan(load_config(raw))

    return make


def seconds(plan: Plan, experiment: str) -> float:
    run = plan.evaluations[experiment, ASKED].predict
    [cost] = [cost for cost in Prices(plan).predictions() if cost.run == run]
    assert cost.seconds is not None and cost.on_gpu
    return cost.seconds


def line(plan: Plan, start: str) -> str:
    [found] = [line for line in describe_plan(plan).splitlines() if line.strip().startswith(start)]
    return " ".join(found.split())


def test_hours_are_those_of_the_model_and_of_what_is_asked(planned):
    """576 vision tokens and 100 words of a 7B: 9 TFLOP, a tenth of a second at the assumed speed."""
    plan = planned()
    vanilla, small = seconds(plan, "vanilla"), seconds(plan, "compress_1")
    assert vanilla == pytest.approx(15_000 * 0.13 + 3000 * 0.03, rel=0.2) and small < vanilla / 2
    start = asked_of(plan, "vanilla").start()
    one = seconds(planned(conditions={"permuted": 0, "blank": False}), "vanilla") - start
    two = seconds(planned(conditions={"permuted": 1, "blank": False}), "vanilla") - start
    no_picture = {"permuted": 0, "blank": False, "text_only": True}
    assert two == pytest.approx(2 * one)
    assert one < seconds(planned(conditions=no_picture), "vanilla") - start < 1.4 * one
    assert seconds(planned(shards=4), "vanilla") == pytest.approx(vanilla + 3 * start)
    assert line(plan, ASKED).endswith(f"6 2 36,000 {(vanilla + small) / 3600:.1f}")


def test_the_papers_configuration_is_priced_as_a_whole():
    text = describe_plan(read_plan([ROOT / "config/beyond-semantics.yaml"]))
    assert "7 diagnoses of up to 50 pictures: 0." in text and "to be done take about" in text
    assert "in all about 77" in text and "assumed until the first answers are there: 94 TFLOP/s" in text
    assert "?" not in text.split("  tasks ")[1]


def test_answers_that_were_given_here_say_how_long_others_take(planned):
    plan = planned()
    run, before = plan.evaluations["vanilla", ASKED].predict, seconds(plan, "compress_1")
    asked, spec = asked_of(plan, "vanilla"), plan.task_spec(ASKED)
    share = 3 * asked.mean_answer(spec, 93.6e12)
    # two processes, of which one was killed and went on as the other
    note_pace(Path(run.folder) / "state", "a", 100, 100 * share)
    note_pace(Path(run.folder) / "state", "b", 50, 50 * share)
    start = asked_of(plan, "compress_1").start()
    assert seconds(plan, "compress_1") - start == pytest.approx(3 * (before - start), rel=1e-3)
    write_json(Path(run.manifest), {"questions": 3000})
    assert line(plan, ASKED).endswith(f"{seconds(plan, 'compress_1') / 3600:.1f}*")
    assert "at the pace of answers that were given here" in describe_plan(plan)
    assert "assumed until" not in describe_plan(plan)


def test_a_training_that_is_finished_says_how_fast_the_card_is(planned):
    plan = planned()
    before, training = seconds(plan, "compress_1"), plan.run("finetune", "vanilla")
    state = Path(training.folder) / "state"
    state.mkdir(parents=True)
    row = {"step": 1, "loss": 1.0, "tokens_per_s": 9.0, "tflop_per_s": 400.0}
    (state / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    write_json(Path(training.manifest), {"folder": "state", "skipped": []})
    assert seconds(plan, "compress_1") < before


def test_a_job_that_is_longer_than_its_limit_is_named_with_the_shards_that_fit(planned):
    found = line(planned(expected_questions=300_000, runtime_min=600), "LONG:")
    assert f"evaluation.tasks.{ASKED}: a job takes about" in found and "runtime_min is 600; shards: " in found
    assert "LONG" not in describe_plan(planned(expected_questions=300_000, runtime_min=600, shards=50))


def test_what_is_unknown_is_a_question_mark(planned, small_files):
    assert line(planned(expected_questions=None), ASKED).split()[-2:] == ["?", "?"]
    cpu = Plan(load_config(copy.deepcopy(SMALL)))
    assert line(cpu, "shapes").split() == ["shapes", "?", "3", "3", "?", "?"]
    run = cpu.evaluations["vanilla", "shapes"].predict
    write_json(Path(run.manifest), {"questions": 24})
    assert line(cpu, "shapes").split() == ["shapes", "24", "3", "3", "216", "?"]


def test_the_disk_has_room_for_copies_of_checkpoints_questions_and_answers(tmp_path, small_files):
    """A stock LLaVA is linked, another layout is written anew."""

    def needed(folder, layout):
        raw = copy.deepcopy(SMALL)
        spec = {"kind": "path", "role": "checkpoint", "path": folder, "layout": layout}
        raw["models"]["published"] = spec
        raw["experiments"]["theirs"] = {"checkpoint": "published"}
        return Plan(load_config(raw))

    described = {"stock": {"model_type": "llava", "text_config": {}, "vision_config": {}}}
    described["variant"] = described["stock"] | {"model_type": "spatial_llava"}
    described["original"] = {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit"}
    for name, content in described.items():
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(content))
        Path(name, "model.safetensors").write_bytes(bytes(10**6))
    assert converted_bytes(needed("stock", "hf")) == 0
    for name, layout in (("variant", "hf"), ("original", "llava")):
        plan = needed(name, layout)
        assert 10**6 < converted_bytes(plan) < 10**6 + 1000
        assert "converted checkpoints of others, at most" in dict(disk_needs(plan, []))
        write_json(Path(plan.run("export", "theirs").manifest), {})
        assert converted_bytes(plan) == 0
    paper = dict(disk_needs(read_plan([ROOT / "config/beyond-semantics.yaml"]), []))
    # pope's three files, the questions and pictures of GQA, CV-Bench's two, and one of `lite`
    written = 3 * 0.085 + 0.002 + 0.066 + 0.185 + 0.220 + 0.079
    assert paper["written questions of lmms-eval"] == pytest.approx(written * 1e9)
    assert paper["answers, scores and diagnoses, about"] == pytest.approx(600 * 645_036 + 7e6)
