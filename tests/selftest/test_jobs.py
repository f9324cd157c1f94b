"""Every kind of job is tried by `sbatch --test-only` on a real private Slurm before anything is fetched."""

import pytest
import yaml

from tests.slurm.sandbox import missing, running
from tests.support.workspace import ROOT
from workflow_scripts.plan.plan import read_plan
from workflow_scripts.selftest.jobs import check_jobs
from workflow_scripts.selftest.settings import kinds_of_job, misnamed
from workflow_scripts.site import line_of

DEMO = ROOT / "config/config.yaml"
FULL = ROOT / "config/llava-v1.5-7b.yaml"


def written(folder, text):
    path = folder / "site.yaml"
    path.write_text(text)
    return path


def job(jobs, name):
    return next(item for item in jobs if item.name == name)


def test_every_kind_of_job_with_the_line_that_says_what_it_asks_for(tmp_path):
    profile = written(
        tmp_path,
        "default-resources:\n  slurm_partition: cpu\n  runtime: 60\nset-resources:\n  finetune:"
        ' {slurm_partition: gpu, mem_mb: "1000 * attempt"}\n  scan:\n    runtime: 2h\n',
    )
    jobs = kinds_of_job(read_plan([FULL]), [FULL], profile)
    names = ["pretrain on compute.pretrain_8gpu", "finetune on compute.finetune_8gpu"]
    assert list(dict.fromkeys(item.name for item in jobs))[:5] == ["scan", "mixture", "survey", *names]
    scan, finetune = job(jobs, "scan"), job(jobs, names[1])
    assert scan.value("slurm_partition") == "cpu" and scan.value("runtime") == 120
    assert scan.settings["runtime"].where == f"{profile}, line 7: set-resources.scan.runtime"
    assert scan.settings["mem_mb"].where == f"{profile}: add set-resources.scan.mem_mb"
    assert finetune.value("slurm_partition") == "gpu" and finetune.value("mem_mb") == 1000
    line = line_of(FULL, ["compute", "finetune_8gpu", "gpus_per_node"])
    assert finetune.settings["gres"].where == f"{FULL}, line {line}: compute.finetune_8gpu.gpus_per_node"
    assert FULL.read_text().splitlines()[line - 1].strip().startswith("gpus_per_node: ")


def test_keys_that_do_not_reach_slurm_are_named_with_the_one_that_does(tmp_path):
    profile = written(
        tmp_path, "default-resources:\n  partition: cpu\nset-resources:\n  scan:\n    account: vision\n"
    )
    found = [item.line for item in misnamed(profile)]
    assert found == [
        (
            f"FAIL profile: {profile}, line 2: default-resources.partition does not reach Slurm; "
            "write `slurm_partition: cpu` instead"
        ),
        (
            f"FAIL profile: {profile}, line 5: set-resources.scan.account does not reach Slurm; "
            "write `slurm_account: vision` instead"
        ),
    ]
    assert not list(misnamed(ROOT / "slurm/config.yaml"))


@pytest.fixture(scope="module")
def sandbox():
    if lacking := missing(accounting=True):
        pytest.skip(f"Slurm is not installed: {', '.join(lacking)}")
    with running(accounting=True) as found:
        yield found


@pytest.fixture
def refused(sandbox, tmp_path, monkeypatch):
    """A function of a profile's text and changes to every `compute`: what Slurm refuses, by kind of job."""
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, sandbox.environment[name])

    def check(profile, **compute):
        content = yaml.safe_load(DEMO.read_text())
        for kind in content["compute"].values():
            kind.update(compute)
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(content))
        found = check_jobs(read_plan([config]), [config], written(tmp_path, profile))
        return {item.what: item.text for item in found if not item.good}

    return check


@pytest.mark.slurm
@pytest.mark.slow
def test_what_a_real_slurm_refuses_names_the_line_to_change(refused, sandbox, tmp_path):
    site, config = tmp_path / "site.yaml", tmp_path / "config.yaml"
    assert not refused("default-resources: {mem_mb: 4000, slurm_partition: gpu, slurm_account: lab}\n")

    (text,) = set(refused("default-resources:\n  slurm_partition: nope\n").values())
    assert "nvalid partition" in text
    assert text.endswith(f"change one of: {site}, line 2: default-resources.slurm_partition (now nope)")

    only = refused("set-resources:\n  scan:\n    constraint: a100\n")
    assert list(only) == ["scan"]
    assert only["scan"].endswith(f"change one of: {site}, line 3: set-resources.scan.constraint (now a100)")

    (text,) = set(refused("default-resources:\n  slurm_account: strangers\n").values())
    assert "The given account strangers" in text and "line 2: default-resources.slurm_account" in text

    big = refused("", mem_mb=99_000)
    line = line_of(config, ["compute", "laptop", "mem_mb"])
    text = big["finetune on compute.laptop"]
    assert f"{config}, line {line}: compute.laptop.mem_mb (now 99000)" in text and "cpus" not in text

    gpus = refused("", gres="gpu:3")["finetune on compute.laptop"]
    assert "compute.laptop.gres (now gpu:3)" in gpus and "mem_mb" not in gpus

    late = refused("default-resources:\n  slurm_partition: short\n", runtime_min=20)
    assert "finetune on compute.laptop" not in late  # 20 of the 30 minutes that `short` allows
    assert "120 minutes; the partition short allows 30" in late["mixture"]
    assert f"{site}: add set-resources.mixture.runtime (now 120)" in late["mixture"]
    assert f"{site}, line 2: default-resources.slurm_partition (now short)" in late["mixture"]

    assert sandbox.output("squeue", "-h", "--states=all") == ""  # nothing was ever submitted
