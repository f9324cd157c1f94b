"""A site's values from a file outside of the clone: merged over the profile; every key means something."""

import io
import re
import shutil
import subprocess
import sys

import pytest
from snakemake.profiles import ProfileConfigFileParser

from tests.support.workspace import ROOT
from workflow_scripts.io import UserError
from workflow_scripts.plan.plan import read_plan
from workflow_scripts.selftest.settings import kinds_of_job
from workflow_scripts.site import RULES, VARIABLE, for_snakemake, site_file

PROFILE = ROOT / "slurm/config.yaml"
SITE = """\
default-resources:
  slurm_partition: cpu
set-resources:
  finetune: {slurm_partition: gpu, mem_mb: "400000 * attempt"}
config: {setup: source /shared/setup.sh}
jobs: 7
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A function that writes the site's file, where the variable says that it is."""
    path = tmp_path / "site.yaml"
    monkeypatch.setenv(VARIABLE, str(path))

    def write(text):
        path.write_text(text)
        return path

    return write


def as_snakemake_reads_it(monkeypatch, profile=PROFILE):
    monkeypatch.setattr(sys, "argv", ["snakemake", "--profile", str(profile.parent), "-n"])
    stream = io.StringIO(profile.read_text())
    stream.name = str(profile)
    return ProfileConfigFileParser().parse(stream)


def test_the_sites_values_win_one_by_one(site, monkeypatch):
    site(SITE)
    found = as_snakemake_reads_it(monkeypatch)
    assert found["default-resources"] == ["mem_mb=4000", "runtime=60", "disk_mb=1000", "slurm_partition=cpu"]
    assert found["set-resources"] == ["finetune:slurm_partition=gpu", "finetune:mem_mb=400000 * attempt"]
    assert found["config"] == ["setup=source /shared/setup.sh"]
    assert (found["jobs"], found["executor"]) == ("7", "slurm")


def test_a_profile_of_the_sites_own_is_merged_with_it_too(site, tmp_path, monkeypatch):
    site("set-resources: {finetune: {qos: long}}\n")
    shutil.copytree(ROOT / "slurm", tmp_path / "clone/slurm")
    profile = tmp_path / "clone/slurm/config.yaml"
    own = "set-resources: {finetune: {constraint: a100, qos: short}}\n"
    profile.write_text(profile.read_text().replace("executor: slurm\n", f"{own}executor: slurm\n"))
    found = as_snakemake_reads_it(monkeypatch, profile)
    assert found["set-resources"] == ["finetune:constraint=a100", "finetune:qos=long"]


def test_every_rule_may_be_named():
    text = "".join(path.read_text() for path in (ROOT / "rules").glob("*.smk"))
    assert set(re.findall(r"^rule (\w+):", text, re.MULTILINE)) - {"data", "list_unused", "clean_unused"} <= {
        *RULES
    }


def test_where_the_file_is(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert site_file() is None
    (tmp_path / "llava-spatial").mkdir()
    (tmp_path / "llava-spatial/slurm.yaml").write_text("jobs: 3\n")
    assert site_file() == tmp_path / "llava-spatial/slurm.yaml"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "absent.yaml"))
    with pytest.raises(UserError, match="there is no such file; unset it or correct it"):
        site_file()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("jobbs: 3\n", "line 1: jobbs: there is no such key here; .* did you mean 'jobs'"),
        ("\nset-resources: {finetun: {}}\n", "line 2: set-resources.finetun: .* did you mean 'finetune'"),
        (
            "default-resources:\n  partition: a\n",
            "line 2: .*partition does not reach .* `slurm_partition: a`",
        ),
        ("set-resources:\n  scan:\n    runtme: 9\n", "line 3: set-resources.scan.runtme: .* 'runtime'"),
        ("default-resources: 3\n", "line 1: default-resources: found 3; allowed: a section"),
        ("set-resources: {scan: 3}\n", "line 1: set-resources.scan: found 3; allowed: key: value lines"),
        ("jobs: 3\njobs: 4\n", "line 2: the key 'jobs' stands already in line 1"),
    ],
)
def test_what_nothing_reads_is_an_error_with_its_line(site, text, said):
    path = site(text)
    with pytest.raises(SystemExit, match=f"error: {path}, {said}"):
        for_snakemake(PROFILE)


def test_snakemake_says_so_and_nothing_else(site):
    path = site("jobbs: 3\n")
    command = [sys.executable, "-m", "snakemake", "--profile", "slurm", "-n"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {path}, line 1: jobbs")


def test_the_self_test_names_the_sites_lines(site):
    path, demo = site(SITE), ROOT / "config/config.yaml"
    jobs = kinds_of_job(read_plan([demo]), [demo], PROFILE)
    finetune = next(job for job in jobs if job.rule == "finetune")
    assert finetune.settings["mem_mb"].where == f"{path}, line 4: set-resources.finetune.mem_mb"
    assert finetune.value("mem_mb") == 400000
    scan = next(job for job in jobs if job.rule == "scan")
    assert scan.settings["slurm_partition"].where == f"{path}, line 2: default-resources.slurm_partition"
