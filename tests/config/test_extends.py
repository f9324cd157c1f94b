"""`extends`: a configuration that says only what differs from another one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from workflow_scripts.config.load import load_config, load_files
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.io import UserError
from workflow_scripts.plan.describe import describe_plan
from workflow_scripts.plan.plan import read_plan
from workflow_scripts.stages import STAGES

ROOT = Path(__file__).parents[2]
FRAGMENTS = {"benchmarks.yaml"}
SHIPPED = sorted(path for path in (ROOT / "config").glob("*.yaml") if path.name not in FRAGMENTS)


@pytest.fixture
def demo(tmp_path):
    """The demo's file in a folder of its own, to be extended."""
    path = tmp_path / "config" / "demo.yaml"
    path.parent.mkdir()
    path.write_text((ROOT / "config/config.yaml").read_text())
    return path


def rates(files):
    loaded = load_files(files)
    return {stage: loaded.experiments["vanilla"].stage(stage).learning_rate for stage in STAGES}


def test_what_is_said_replaces_and_the_rest_stays(demo):
    mine = demo.with_name("mine.yaml")
    mine.write_text("extends: demo.yaml\nstages: {finetune: {learning_rate: 1.0e-4}}\n")
    assert rates([mine]) == {"pretrain": 5e-3, "finetune": 1e-4}
    assert load_files([mine]).names == load_files([demo]).names


def test_a_chain_and_a_second_file(demo, tmp_path):
    """The nearest file wins, and what stands behind on the command line comes last."""
    (demo.parent / "one.yaml").write_text(
        "extends: demo.yaml\nstages: {pretrain: {learning_rate: 1.0}, finetune: {learning_rate: 1.0}}\n"
    )
    two, site = tmp_path / "two.yaml", tmp_path / "site.yaml"
    two.write_text("extends: config/one.yaml\nstages: {finetune: {learning_rate: 2.0}}\n")
    assert rates([two]) == {"pretrain": 1.0, "finetune": 2.0}
    site.write_text("stages: {finetune: {learning_rate: 3.0}}\n")
    assert rates([two, site]) == {"pretrain": 1.0, "finetune": 3.0}


def test_of_several_files_later_ones_are_merged_into_earlier_ones(demo):
    (demo.parent / "rates.yaml").write_text("stages: {pretrain: {learning_rate: 1.0}}\n")
    (demo.parent / "rest.yaml").write_text("stages: {pretrain: {learning_rate: 2.0}}\n")
    mine = demo.with_name("mine.yaml")
    mine.write_text("extends: [demo.yaml, rates.yaml, rest.yaml]\n")
    assert rates([mine]) == {**rates([demo]), "pretrain": 2.0}
    mine.write_text("extends: [demo.yaml, mine.yaml]\n")
    with pytest.raises(UserError, match=r"mine\.yaml: extends itself"):
        load_files([mine])


def test_benchmarks_are_a_fragment_of_which_only_chosen_tasks_are_asked(demo):
    """Nothing is fetched or prepared for the others. Numbered files are all named, those of a pattern
    are not known before they are asked for.
    """
    mine = demo.with_name("mine.yaml")
    benchmarks = ROOT / "config/benchmarks.yaml"
    mine.write_text(
        f"extends: [demo.yaml, {benchmarks}]\nevaluation: {{default_tasks: [shapes, gqa]}}\n"
        "experiments: {compress_1: {tasks: [vqav2_val]}}\n"
    )
    plan = read_plan([mine])
    asked = {name: [item.task for item in plan.evaluations_of(name)] for name in plan.experiments}
    assert asked.pop("compress_1") == ["vqav2_val"]
    assert set(map(tuple, asked.values())) == {("shapes", "gqa")}
    assert set(plan.questions) == {"gqa", "vqav2_val"}
    assert {"gqa_testdev", "vqav2_val"} <= set(plan.used_sources()) and "pope" not in plan.used_sources()
    [pattern] = plan.config.sources["vqav2_val"].files
    assert pattern.is_pattern and pattern.path == "data/validation-*.parquet"
    numbered = [file.path for file in plan.config.sources["lite"].files if "seed" in file.path]
    assert numbered == [f"seedbench/lite-{number:05d}-of-00002.parquet" for number in range(2)]
    mine.write_text(f"extends: [demo.yaml, {benchmarks}]\nevaluation: {{default_tasks: [gqqa]}}\n")
    with pytest.raises(UserError, match=r"evaluation\.default_tasks\[0\]: found 'gqqa'"):
        read_plan([mine])


def test_benchmarks_are_beside_what_is_trained_on_and_change_no_training():
    fragment = read_yaml(ROOT / "config/benchmarks.yaml")["sources"].keys()
    for path in SHIPPED:
        assert not fragment & read_yaml(path).get("sources", {}).keys(), path
    paper, full = (
        read_plan([ROOT / f"config/{name}.yaml"]) for name in ("beyond-semantics", "llava-v1.5-7b")
    )
    shared = paper.experiments.keys() & full.experiments.keys()
    assert {"vanilla", "normalize", "normalize_multilayer"} <= shared
    for name in shared:
        assert paper.run("finetune", name) == full.run("finetune", name)


def test_the_papers_experiments_are_asked_compared_and_looked_into():
    plan = read_plan([ROOT / "config/beyond-semantics.yaml"])
    assert set(plan.comparisons()) | {plan.baseline} == plan.experiments.keys() == set(plan.diagnosed())
    about = {item.task: plan.task_spec(item.task).benchmark for item in plan.evaluations_of("vanilla")}
    assert {"2ds", "pope", "gqa", "vqav2", "cv_bench_2d"} <= set(about.values())
    # 3,000 questions as they are, in three orders, about a blank picture and without one
    [line] = [line.split() for line in describe_plan(plan).splitlines() if line.startswith("  two_d ")]
    assert line[:-1] == ["two_d", "3000", "6", "7", "126,000"] and 1 < float(line[-1]) < 10


def test_null_takes_an_entry_away(demo):
    mine = demo.with_name("mine.yaml")
    mine.write_text("extends: demo.yaml\nexperiments: {compress_1: null, compress_4: ~}\n")
    assert load_files([mine]).names == ["vanilla", "normalize", "normalize_multilayer"]


def test_snakemake_reads_it_too(demo, tmp_path):
    """From another folder: the path is relative to the file."""
    mine = demo.with_name("mine.yaml")
    mine.write_text("extends: demo.yaml\nexperiments: {gentle: {finetune: {learning_rate: 1.0e-4}}}\n")
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "-n", "--configfile", mine]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "experiments/gentle/checkpoint.json" in done.stdout
    assert "experiments/compress_1/checkpoint.json" in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: gone.yaml", "extends: gone.yaml: no such file; looked for"),
        ("extends: [7]", "allowed is the path of a configuration file, or a list"),
        ("extends: mine.yaml", "extends itself"),
        ("extends: broken.yaml", "broken.yaml, line 2: not valid YAML"),
    ],
)
def test_a_base_that_is_none(demo, text, message):
    (demo.parent / "broken.yaml").write_text("a: 1\n  b: 2\n")
    mine = demo.with_name("mine.yaml")
    mine.write_text(text + "\n")
    with pytest.raises(UserError, match=message):
        load_config(read_yaml(mine), [mine])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid_and_can_be_planned(path):
    text = describe_plan(read_plan([path]))
    assert "trainings are to be done" in text or "done" in text


def test_one_gpu_shares_stage_1_with_eight():
    """How many GPUs compute it names no training: who has the 7B stage 1 needs no other for LoRA."""
    eight, one = (
        read_plan([ROOT / f"config/{name}.yaml"]) for name in ("llava-v1.5-7b", "llava-v1.5-7b-lora")
    )
    for name in eight.experiments:
        assert eight.run("pretrain", name).name == one.run("pretrain", name).name
        assert eight.run("finetune", name).name != one.run("finetune", name).name
