"""The printed plan: what is fetched, what disk it takes, which jobs run; and the full-size configuration."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from workflow_scripts.acquire.hub_cache import cached_in_hub
from workflow_scripts.config.mixtures import MixtureSpec
from workflow_scripts.launch.preflight import importable
from workflow_scripts.plan import describe as plan
from workflow_scripts.plan.describe import describe_plan, is_dry_run
from workflow_scripts.plan.needs import Item, source_items
from workflow_scripts.plan.plan import read_plan
from workflow_scripts.sources import SourceSpec

ROOT = Path(__file__).parents[2]
FULL = ROOT / "config" / "llava-v1.5-7b.yaml"
DEMO = ROOT / "config" / "config.yaml"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


@pytest.mark.parametrize(
    ("words", "dry"),
    [
        (["-n"], True),
        (["-np"], True),
        (["--dry-run", "all"], True),
        (["--dryrun"], True),
        (["-j", "4"], False),
        (["-nq"], True),
        (["--snakefile", "nnn"], False),
        (["--notemp"], False),
        (["-c1"], False),
    ],
)
def test_dry_runs_are_recognised(words, dry):
    assert is_dry_run(["snakemake", *words]) == dry


def test_the_demo_fetches_nothing():
    text = describe_plan(read_plan([DEMO]))
    assert "Nothing is fetched" in text
    assert "10 of 10 trainings are to be done" in text


SOURCE = TypeAdapter(SourceSpec)
SPEC = SOURCE.validate_python(
    {
        "kind": "hub",
        "repo": "owner/name",
        "revision": "abc1234",
        "files": [
            {"path": "a.json", "role": "annotations", "bytes": 1000},
            {"path": "images.zip", "role": "images", "about_gb": 2},
            {"path": "more.bin", "role": "other"},
        ],
    }
)


def test_files_that_are_there_partly_there_or_cached_are_not_fetched_again(tmp_path):
    folder = tmp_path / "data" / "sources" / "x"
    assert [item.missing for item in source_items("x", SPEC, folder)] == [1000, 2e9, 0]
    folder.mkdir(parents=True)
    (folder / "a.json").write_bytes(b"")
    (folder / "images.zip.part").write_bytes(bytes(500))
    cached = tmp_path / "hf" / "hub" / "datasets--owner--name" / "snapshots" / ("abc1234" + "0" * 33)
    cached.mkdir(parents=True)
    (cached / "more.bin").write_bytes(b"")
    states = source_items("x", SPEC, folder)
    assert [item.state for item in states] == ["there", "500 bytes of it are there", "in the hub's cache"]
    assert states[1].missing == 2e9 - 500
    assert cached_in_hub("owner/name", "dataset", "abc1234", "more.bin")
    assert not cached_in_hub("owner/name", "dataset", "fff", "more.bin")


def test_local_copies_are_not_fetched(tmp_path):
    spec = SPEC.model_copy(update={"local": type(SPEC.local)(images="/mine.zip")})
    assert source_items("x", spec, tmp_path)[1] == Item("x/images.zip", 2e9, 2e9, "yours, used in place")


def test_the_full_size_data_are_those_of_llava():
    """Prefixes, archives and counts of LLaVA-1.5's own instructions."""
    config = yaml.safe_load(FULL.read_text())
    for spec in config["sources"].values():
        SOURCE.validate_python(spec)
    mixtures = {name: MixtureSpec.model_validate(spec) for name, spec in config["mixtures"].items()}
    assert {p.expected_records for m in mixtures.values() for p in m.parts} == {558_128, 665_298}
    [instruct] = mixtures["llava_665k"].parts
    assert {m.prefix for m in instruct.images} == {
        "coco/train2017",
        "gqa/images",
        "ocr_vqa/images",
        "textvqa/train_images",
        "vg/VG_100K",
        "vg/VG_100K_2",
    }
    images = sum(spec.get("expected_images", 0) for spec in config["sources"].values())
    assert images == 558_128 + 118_287 + 148_854 + 207_572 + 25_119 + 64_346 + 43_903
    assert config["sources"]["gqa"]["connections_per_host"] == 1
    pinned = [spec["revision"] for spec in config["sources"].values() if spec["kind"] == "hub"]
    assert all(len(revision) >= 7 and int(revision, 16) for revision in pinned)


def test_the_full_size_plan_is_readable():
    done = subprocess.run(
        [sys.executable, "-m", "workflow_scripts.plan", "--configfile", str(FULL)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert "coco/train2017.zip" in done.stdout
    assert "19.34  to fetch" in done.stdout
    assert "GPU hours" in done.stdout
    assert "free here" in done.stdout


def test_the_exploratory_experiments_are_valid_when_they_are_taken_in(tmp_path):
    """They stand in the file behind a #."""
    text, inside = [], False
    for line in FULL.read_text().splitlines():
        inside = inside or line.startswith("  # Exploratory")
        taken_in = inside and not line.startswith("  # Exploratory")
        text.append(line.replace("  # ", "  ", 1) if taken_in else line)
    (tmp_path / "all.yaml").write_text("\n".join(text))
    experiments = read_plan([tmp_path / "all.yaml"]).experiments
    assert {"positions_2d", "interleave_8", "coordinates"} <= set(experiments)
    assert len(experiments) == 10


def test_snakemakes_dry_run_prints_the_plan(tmp_path):
    """The whole graph at full size, seven experiments, in seconds and without a network."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "snakemake",
            "-s",
            str(ROOT / "Snakefile"),
            "-n",
            "-q",
            "--configfile",
            str(FULL),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=120,
    )
    shown = done.stdout + done.stderr
    assert done.returncode == 0, shown
    assert "14 of 14 trainings are to be done" in shown
    assert "to fetch in all" in shown


def test_a_site_file_is_merged_over_the_configuration(tmp_path):
    """As Snakemake merges several --configfile."""
    mine = tmp_path / "mysite.yaml"
    mine.write_text("mixtures: {shapes_pretrain: {seed: 7}}\n")
    assert read_plan([DEMO, mine]).config.mixtures["shapes_pretrain"].seed == 7


@pytest.mark.parametrize(("text", "message"), [("a: [", "not valid YAML"), ("sources: 3", "sources")])
def test_bad_files(tmp_path, capsys, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit):
        plan.main(["--configfile", "bad.yaml"])
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plan.main(["--configfile", "nothing.yaml"])
    assert "does not exist" in capsys.readouterr().err


def test_trackers_that_are_not_installed_are_said_before_anything_runs(tmp_path):
    more = tmp_path / "more.yaml"
    more.write_text("stages: {finetune: {report_to: [tensorboard, wandb, trackio]}}\n")
    missing = [name for name in ("wandb", "trackio") if not importable(name)]
    text = describe_plan(read_plan([DEMO, more]))
    assert text.count("NOT INSTALLED") == len(missing)
    assert all(f"stages.finetune.report_to names {name}, but {sys.executable}" in text for name in missing)
    assert "NOT INSTALLED" not in describe_plan(read_plan([DEMO]))


def test_jobs_that_would_not_see_the_working_folder_are_refused_before_anything_runs(tmp_path):
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "-n"]
    done = subprocess.run(
        [*command, "--shared-fs-usage", "none"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "--shared-fs-usage lacks input-output and sources" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


CLOUD = """
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
from snakemake_interface_executor_plugins.settings import CommonSettings

common_settings = CommonSettings(
    non_local_exec=True, implies_no_shared_fs=True, job_deploy_sources=True, can_transfer_local_files={can}
)


class Executor(RemoteExecutor):
    def run_job(self, job):
        raise AssertionError("a job was started")

    async def check_active_jobs(self, active_jobs):
        yield

    def cancel_jobs(self, active_jobs):
        pass
"""


@pytest.mark.parametrize(("can_carry_files", "way"), [(False, "profile"), (True, "command line")])
def test_an_executor_without_a_shared_file_system_is_refused_in_one_sentence(tmp_path, can_carry_files, way):
    """One that says so of itself, as those of Kubernetes and of cloud batch services do."""
    plugin = tmp_path / "snakemake_executor_plugin_clouds/__init__.py"
    plugin.parent.mkdir()
    plugin.write_text(CLOUD.format(can=can_carry_files))
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile/config.yaml").write_text("executor: clouds\njobs: 1\n")
    chosen = ["--executor", "clouds", "--jobs", "1"] if way == "command line" else ["--profile", "profile"]
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), *chosen],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "--executor clouds: its jobs see no file of this machine" in said
    assert "docs/slurm.md" in said and "Traceback" not in said and not (tmp_path / "data").exists()


def test_a_target_behind_the_configuration_is_told_where_to_stand(tmp_path):
    """Whether it is there already, or not yet."""
    made, missing = "experiments/vanilla/checkpoint.json", "experiments/normalize/checkpoint.json"
    (tmp_path / made).parent.mkdir(parents=True)
    (tmp_path / made).write_text('{"experiment": "vanilla"}\n')
    for target, hint in (
        (made, f"put the target before it, as in `snakemake {made} --configfile"),
        (missing, f"a target stands before it: snakemake {missing} --configfile FILE"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "-n", "--configfile", DEMO, target],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        said = done.stdout + done.stderr
        assert done.returncode == 1 and "Traceback" not in said and hint in said
