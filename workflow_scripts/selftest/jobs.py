"""Every kind of job of a configuration, tried by `sbatch --test-only`: nothing is submitted, nothing waits.

What Slurm refuses is tried again without one resource after the other. Those without which it is accepted are
to blame, whatever the words of this version of Slurm are.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from workflow_scripts.io import UserError
from workflow_scripts.plan.plan import Plan
from workflow_scripts.selftest.findings import Finding
from workflow_scripts.selftest.settings import Job, kinds_of_job, misnamed

# What can be left out, and what else goes with it.
BLAMED: dict[str, tuple[str, ...]] = {
    "slurm_partition": (),
    "slurm_account": (),
    "qos": (),
    "constraint": (),
    "gres": ("tasks_per_gpu",),
    "nodes": ("mpi", "tasks"),
    "mem_mb": (),
    "threads": (),
    "runtime": (),
}
# What a partition's time limit is about.
TIME_KEYS = ["runtime", "slurm_partition"]


class Resources(dict[str, Any]):
    """A job's resources as the Slurm plugin reads them: by key and as attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class AskedJob:
    """What the Slurm plugin looks at when it writes a job's `sbatch` command."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        self.threads = int(asked.get("threads") or 1)
        self.resources = Resources({key: value for key, value in asked.items() if value is not None})


def check_jobs(plan: Plan, configfiles: Sequence[Path], profile: Path) -> Iterator[Finding]:
    """Misnamed keys of the profile, then each kind of job: accepted, or the lines that have to change."""
    if shutil.which("sbatch") is None:
        raise UserError("--slurm: there is no sbatch here; run it on a machine that can submit Slurm jobs")
    yield from misnamed(profile)
    yield from try_jobs(kinds_of_job(plan, configfiles, profile))


def try_jobs(jobs: Iterable[Job]) -> Iterator[Finding]:
    """What Slurm says of each job."""
    limits = time_limits()
    for job in jobs:
        refused, late = refusal(values(job)), over_limit(job, limits)
        if not refused and not late:
            yield Finding(job.name, True, "Slurm would take the job")
            continue
        keys = to_blame(job) if refused else TIME_KEYS
        lines = [f"{job.settings[key].where} (now {job.value(key)})" for key in keys if job.value(key)]
        what = (
            f"Slurm refuses the job ({refused})" if refused else f"Slurm would never start the job ({late})"
        )
        yield Finding(job.name, False, f"{what}; change one of: {'; '.join(lines)}")


def values(job: Job) -> dict[str, Any]:
    """A job's resources without where they were said."""
    return {key: setting.value for key, setting in job.settings.items()}


def to_blame(job: Job) -> list[str]:
    """The resources without which Slurm takes the job; all that are set where none does alone."""
    asked = values(job)
    present = [key for key in BLAMED if asked.get(key) is not None]
    alone = [
        key
        for key in present
        if not refusal({name: asked[name] for name in asked if name not in (key, *BLAMED[key])})
    ]
    return alone or present


def refusal(asked: Mapping[str, Any]) -> str | None:
    """What Slurm says against a job with these resources; None when it would take it."""
    from snakemake_interface_common.exceptions import WorkflowError

    try:
        command = [*shlex.split(submit_command(asked)), "--test-only", "--wrap", "true"]
    except WorkflowError as error:  # the plugin itself checks accounts and how many tasks go with what
        return " ".join(str(error).split())
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "sbatch gives no answer within two minutes"
    words = [line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines() if line.strip()]
    return None if done.returncode == 0 else "; ".join(words) or f"sbatch ended with {done.returncode}"


def submit_command(asked: Mapping[str, Any]) -> str:
    """The Slurm plugin's own command for a job."""
    import logging

    from snakemake_executor_plugin_slurm.accounts import validate_account
    from snakemake_executor_plugin_slurm.submit_string import get_submit_command
    from snakemake_executor_plugin_slurm.utils import set_gres_string

    options = {"account": "", "partition": ""}
    if account := asked.get("slurm_account"):
        validate_account(str(account), logging.getLogger(__name__))
        options["account"] = f"-A {shlex.quote(str(account))}"
    if partition := asked.get("slurm_partition"):
        options["partition"] = f"-p {shlex.quote(str(partition))}"
    fixed = {"run_uuid": "llava-selftest", "slurm_logfile": "/dev/null", "comment_str": "", "workdir": None}
    job = AskedJob(asked)
    return f"{get_submit_command(job, fixed | options)}{set_gres_string(job)}"


# ---------------------------------------------------------------- limits of partitions


def over_limit(job: Job, limits: Mapping[str, tuple[float | None, bool]]) -> str | None:
    """Why a job would wait for ever: most Slurms take what is above a partition's time limit, and never
    start it.
    """
    minutes, named = job.value("runtime"), job.value("slurm_partition")
    wanted = str(named).split(",") if named else [name for name, (_, default) in limits.items() if default]
    longest = [limits[name][0] for name in wanted if name in limits]
    if not minutes or not longest or any(limit is None or minutes <= limit for limit in longest):
        return None
    allowed = max(limit for limit in longest if limit is not None)
    return f"{minutes} minutes; the partition {', '.join(wanted)} allows {allowed:g}"


def time_limits() -> dict[str, tuple[float | None, bool]]:
    """The minutes that each partition allows (None: no limit), and whether it is the default one."""
    done = subprocess.run(
        ["scontrol", "show", "partition", "-o"], capture_output=True, text=True, timeout=60, check=False
    )
    found = {}
    for line in done.stdout.splitlines():
        shown = dict(re.findall(r"(\w+)=(\S*)", line))
        found[shown["PartitionName"]] = (_minutes(shown["MaxTime"]), shown.get("Default") == "YES")
    return found


def _minutes(text: str) -> float | None:
    """Slurm's `1-02:03:04` in minutes; None for UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 1440 + hours * 60 + minutes + seconds / 60
