"""What the self-test says about a machine, for a configuration, and on compute nodes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.slurm.sandbox import missing, running
from tests.support.workspace import ROOT
from workflow_scripts.config.compute import ComputeSpec
from workflow_scripts.launch.preflight import importable
from workflow_scripts.plan.plan import read_plan
from workflow_scripts.selftest import machine, needs, nodes

DEMO = ROOT / "config/config.yaml"
FULL = ROOT / "config/llava-v1.5-7b.yaml"


def selftest(*arguments, **options):
    command = [sys.executable, "-m", "workflow_scripts.selftest", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **options
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def lines(found):
    return [item.line for item in found]


@pytest.mark.slow
def test_what_is_there_and_what_is_not(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("experiments: {}\n")
    good = selftest("--directory", tmp_path, "--configfile", DEMO)
    assert f"ok   configuration: {DEMO}: 5 experiments" in good.stdout
    assert "ok   file locks: work" in good.stdout
    assert good.returncode == 0, good.stdout
    wrong = selftest("--directory", tmp_path, "--configfile", bad)
    assert wrong.returncode == 1
    assert "FAIL configuration" in wrong.stdout and "1 thing is missing" in wrong.stdout
    assert "--slurm needs --configfile" in selftest("--slurm").stderr


def test_a_folder_that_cannot_be_written(tmp_path):
    found = lines(machine.check_folder(Path("/proc")))
    assert any(line.startswith("FAIL working folder: /proc") for line in found)
    assert "ok   file locks: work" in lines(machine.check_folder(tmp_path))


def test_too_few_gpus_fail_only_where_they_are_wanted():
    wanted = next(machine.check_hardware(99))
    assert wanted.line.startswith("FAIL GPUs:") and "torch can use 0 of 99 wanted" in wanted.line
    assert not next(machine.check_hardware()).line.startswith("FAIL")


@pytest.mark.skipif(importable("flash_attn"), reason="flash-attn is installed")
def test_flash_attention_is_looked_for_where_it_is_used():
    kinds = {
        "big": ComputeSpec(gpus_per_node=1, precision="bf16", kernels={"attention": "flash_attention_2"})
    }
    (found,) = needs.check_flash_attention(kinds)
    assert found.line.startswith("FAIL flash-attn: compute.big.kernels.attention")
    assert "or set attention: varlen" in found.text
    assert not list(needs.check_flash_attention({"small": ComputeSpec()}))


def test_offload_needs_a_compiler(tmp_path, monkeypatch):
    kinds = {"big": ComputeSpec(gpus_per_node=8, parallel="zero3", offload="optimizer")}
    assert not list(needs.check_compiler({"small": ComputeSpec()}))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = needs.check_compiler(kinds)
    assert found.line.startswith("FAIL offload: compute.big.offload")
    assert "lacks a C++ compiler" in found.text
    for name in ("g++", "ninja"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    (found,) = needs.check_compiler(kinds)
    assert "lacks a C++ compiler" not in found.text and "ninja," not in found.text.partition("lacks")[2]


def test_shared_memory_is_compared_with_what_data_workers_fill():
    common = {"gpus_per_node": 8, "parallel": "ddp"}
    small = ComputeSpec(**common, dataloader_workers=1, per_device_batch_size=1)
    huge = ComputeSpec(**common, dataloader_workers=64, per_device_batch_size=10**6)
    assert lines(needs.check_shared_memory({"small": small}))[0].startswith("ok ")
    (found,) = needs.check_shared_memory({"small": small, "huge": huge})
    assert found.line.startswith("note shared memory") and "compute.huge may fill" in found.text
    assert not list(needs.check_shared_memory({"none": ComputeSpec()}))


def test_space_and_what_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    found = {item.what: item for item in needs.check_needs(read_plan([FULL]), tmp_path)}
    assert found["space"].good == (shutil.disk_usage(tmp_path).free > 694e9)
    assert "about 694 GB are needed" in found["space"].text
    assert "11 of 11 are not there yet (data/sources/llava_pretrain" in found["data and models"].text
    plan = read_plan([DEMO])
    made = [Path("data/sources") / name for name in plan.config.sources]
    for folder in [*made, *(Path("models") / name for name in plan.config.models)]:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "manifest.json").write_text("{}")
    said = lines(needs.check_needs(plan, tmp_path))
    assert "ok   data and models: all are there; trainings need no network" in said


def test_trackers_that_are_missing_fail(tmp_path):
    more = tmp_path / "more.yaml"
    more.write_text("stages: {pretrain: {report_to: [wandb, trackio]}}\n")
    found = lines(needs.check_needs(read_plan([DEMO, more]), tmp_path))
    lacking = [name for name in ("wandb", "trackio") if not importable(name)]
    assert sum(line.startswith("FAIL tracker: stages.pretrain.report_to names") for line in found) == len(
        lacking
    )


# ---------------------------------------------------------------- compute nodes


def test_one_small_job_for_each_kind_with_the_sites_options(tmp_path):
    site = {
        "default-resources": {"mem_mb": 1, "slurm_account": "vision", "slurm_partition": "cpu"},
        "set-resources": {"finetune": {"slurm_partition": "gpu", "constraint": "a100"}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(site))
    found = nodes.commands(read_plan([FULL]), tmp_path, ["test"])
    assert list(found) == ["compute.pretrain_8gpu", "compute.finetune_8gpu"]
    last = found["compute.finetune_8gpu"]
    assert last[-3:] == ["test", "--gpus", "8"]
    wanted = {"--gres=gpu:8", "--partition=gpu", "--account=vision", "--constraint=a100", "--nodes=1"}
    assert wanted <= set(last)
    assert "--partition=cpu" in found["compute.pretrain_8gpu"]
    same = nodes.commands(read_plan([FULL]), tmp_path / "absent", ["test"])
    assert list(same) == ["compute.pretrain_8gpu, compute.finetune_8gpu"], "equal jobs are run once"


def test_it_starts_as_a_step_does_with_the_sites_interpreter_after_its_setup(tmp_path):
    site = {"config": {"setup": "ulimit -n 77", "python": "echo"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(site))
    command = nodes.site_test(read_plan([FULL]), tmp_path, ["--directory", "a b"])
    command[2] = command[2].replace("exec", "ulimit -n; exec")
    done = subprocess.run([*command, "--gpus", "8"], capture_output=True, text=True, check=True)
    assert done.stdout == "77\n-m workflow_scripts.selftest --directory a b --gpus 8\n"


def test_the_profile_as_it_comes_can_be_read():
    assert nodes.site_options(ROOT / "slurm", "finetune") == []


@pytest.mark.slurm
@pytest.mark.skipif(bool(missing(False)), reason="Slurm is not installed")
def test_the_self_test_runs_on_the_machines_of_a_training(tmp_path):
    content = yaml.safe_load(DEMO.read_text())
    two = {"nodes": 2, "gres": "gpu:2", "processes_per_node": 1, "parallel": "ddp"}
    for name in content["compute"]:
        content["compute"][name] |= {**two, "per_device_batch_size": 4}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    with running() as sandbox:
        done = selftest("--slurm", "--configfile", config, "--directory", tmp_path, env=sandbox.environment)
        absent = sandbox.environment | {"PATH": str(Path(sys.executable).parent)}
        refused = selftest("--slurm", "--configfile", DEMO, env=absent)
    assert done.returncode == 0, done.stdout + done.stderr
    for task in ("0", "1"):
        assert f"{task}: ok   working folder: {tmp_path}" in done.stdout
        assert f"{task}: everything that is needed is here" in done.stdout
    assert "has what is needed" in done.stdout
    assert "ok   scan: Slurm would take the job" in done.stdout
    assert "there is no sbatch here" in refused.stderr
