"""The same question at the start of the workflow: would Slurm take what is about to be submitted?

Every kind of job that is to be done is tried with the resources that Snakemake itself has put together from
profile, rules and command line, before the first download.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from workflow_scripts.io import UserError
from workflow_scripts.launch import requeue
from workflow_scripts.launch.provenance import ROOT
from workflow_scripts.plan.plan import Plan
from workflow_scripts.selftest.findings import Finding
from workflow_scripts.selftest.jobs import BLAMED, try_jobs
from workflow_scripts.selftest.settings import Job, Setting, kinds_of_job, misnamed
from workflow_scripts.site import MISNAMED

ASKED = {*BLAMED, *(key for more in BLAMED.values() for key in more), "slurm_extra"}


def check_start(workflow: Any, plan: Plan) -> None:
    """Raises UserError with the lines to change, where Slurm would refuse a job. Nothing without Slurm."""
    if not requeue.run_name(workflow):
        return
    files = [Path(file) for file in workflow.configfiles]
    profile = profile_of(sys.argv)
    known = kinds_of_job(plan, files, profile)
    asked = [
        (job.rule.name, resources(job)) for job in workflow.dag.needrun_jobs() if submitted(workflow, job)
    ]
    wrong = [*misnamed(profile), *misnamed_elsewhere(asked), *try_jobs(located(asked, known))]
    lines = dict.fromkeys(item.line for item in wrong if not item.good)
    if lines:
        raise UserError(
            "\n".join([*lines, "nothing was fetched or submitted; `python -m workflow_scripts.selftest"])
            + f" --slurm --configfile {' '.join(map(str, files))}` asks again"
        )


def submitted(workflow: Any, job: Any) -> bool:
    """Whether a job of Snakemake goes to Slurm."""
    return not job.is_group() and not workflow.is_local(job.rule)


def resources(job: Any) -> dict[str, Any]:
    """What the first attempt of a job asks for. Not `job.resources`: Snakemake would keep what it is now."""
    found = job.rule.expand_resources(job.wildcards_dict, job.input, 1, skip_evaluation={"tmpdir"})
    asked = {key: value for key, value in found.items() if key in ASKED or key in MISNAMED}
    return asked | {"threads": found["_cores"]}


def profile_of(argv: Sequence[str]) -> Path:
    """The file of the profile that the command line names; this clone's own where it is not seen here."""
    given = [following for word, following in pairwise(argv) if word == "--profile"]
    given += [word.removeprefix("--profile=") for word in argv if word.startswith("--profile=")]
    path = Path(given[-1] if given else "slurm")
    found = [file for file in (path, path / "config.yaml") if file.is_file()]
    return found[0] if found else ROOT / "slurm/config.yaml"


def misnamed_elsewhere(asked: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[Finding]:
    """Keys of the command line that reach Slurm under another name only."""
    words = " ".join(sys.argv)
    for rule, found in asked:
        for key in MISNAMED:
            if key in found and f"{key}=" in words:
                text = f"{key} does not reach Slurm; write `{MISNAMED[key]}={found[key]}` instead"
                yield Finding("command line", False, f"{text} ({rule})")


def located(asked: Sequence[tuple[str, Mapping[str, Any]]], known: Sequence[Job]) -> list[Job]:
    """The kinds of job among those asked for, each value with the place that says it."""
    found: dict[tuple[str, str], Job] = {}
    for rule, values in asked:
        kinds = [job for job in known if job.rule == rule]
        settings = {key: Setting(value, _place(kinds, rule, key, value)) for key, value in values.items()}
        nearest = max(kinds, key=lambda job: _equal(job, values), default=None)
        name = nearest.name if nearest else rule
        found.setdefault((rule, str(sorted(values.items()))), Job(name, rule, settings))
    return list(found.values())


def _equal(job: Job, values: Mapping[str, Any]) -> int:
    return sum(job.value(key) == value for key, value in values.items())


def _place(kinds: Sequence[Job], rule: str, key: str, value: Any) -> str:
    for job in kinds:
        if key in job.settings and str(job.value(key)) == str(value):
            return job.settings[key].where
    option, name = ("--set-threads", rule) if key == "threads" else ("--set-resources", f"{rule}:{key}")
    if any(word.startswith(f"{name}=") for word in sys.argv):
        return f"the command line ({option} {name})"
    return f"{profile_of(sys.argv)}: add {option.removeprefix('--')}.{name.replace(':', '.')}"
