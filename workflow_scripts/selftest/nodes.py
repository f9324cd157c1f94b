"""The same self-test on compute nodes, in one small job for each kind that the configuration's trainings
ask for.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from workflow_scripts import step
from workflow_scripts.config.compute import ComputeSpec
from workflow_scripts.launch.provenance import ROOT
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plan.resources import resources_of
from workflow_scripts.selftest.findings import Finding
from workflow_scripts.site import read_profile
from workflow_scripts.stages import STAGES

# What a site says in the profile, and srun's word for it.
SITE = {
    "slurm_partition": "--partition",
    "slurm_account": "--account",
    "qos": "--qos",
    "constraint": "--constraint",
}
MINUTES = 10


def site_options(profile: Path, stage: str) -> list[str]:
    """srun's options for a rule, from the block "your site" of ``slurm/config.yaml``; none where there is
    no profile.
    """
    content = read_profile(profile / "config.yaml")
    found: dict[str, Any] = {}
    for section in (content.get("default-resources"), (content.get("set-resources") or {}).get(stage)):
        found |= section if isinstance(section, Mapping) else {}
    return [f"{option}={found[key]}" for key, option in SITE.items() if found.get(key)]


def site_test(plan: Plan, profile: Path, arguments: Sequence[str]) -> list[str]:
    """The self-test as a step would start: with the site's interpreter, after its setup."""
    site = {
        "setup": plan.config.setup,
        "python": plan.config.python,
        **(read_profile(profile / "config.yaml").get("config") or {}),
    }
    start = step.command(
        site["python"] or sys.executable, ROOT, site["setup"] or "", "workflow_scripts.selftest"
    )
    # what `node_command` adds to it arrives as "$@"
    return ["bash", "-c", f'{start} {shlex.join(arguments)} "$@"', "selftest"]


def node_command(compute: ComputeSpec, site: Sequence[str], test: Sequence[str]) -> list[str]:
    """srun with the machines and GPUs of a training, but few CPUs, little memory and time."""
    gres = resources_of(compute)["gres"]
    command = ["srun", f"--nodes={compute.nodes}", f"--ntasks={compute.nodes}", "--ntasks-per-node=1"]
    command += [
        "--cpus-per-task=1",
        f"--mem={min(compute.mem_mb, 4000)}",
        f"--time={MINUTES}",
        "--job-name=llava-selftest",
        "--quiet",
    ]
    command += ["--label"] * (compute.nodes > 1)
    wanted = ["--gpus", str(compute.gpus_per_node)] if compute.gpus_per_node else []
    return [*command, *([f"--gres={gres}"] if gres else []), *site, *test, *wanted]


def commands(plan: Plan, profile: Path, test: Sequence[str]) -> dict[str, list[str]]:
    """One command for each kind of job, under the names of the kinds that it stands for."""
    found: dict[str, list[str]] = {}
    for stage in STAGES:
        for name in dict.fromkeys(
            experiment.stage(stage).compute for experiment in plan.experiments.values()
        ):
            command = node_command(plan.config.compute[name], site_options(profile, stage), test)
            same = next((key for key, value in found.items() if value == command), None)
            if same is None:
                found[f"compute.{name}"] = command
            elif f"compute.{name}" not in same.split(", "):
                found[f"{same}, compute.{name}"] = found.pop(same)
    return found


def check_nodes(plan: Plan, configfiles: Sequence[Path], folder: Path) -> Iterator[Finding]:
    """Runs the self-test in Slurm jobs and shows what it says there; they wait in the queue like any
    other.
    """
    arguments = ["--configfile", *(str(path.absolute()) for path in configfiles), "--directory", str(folder)]
    test = site_test(plan, ROOT / "slurm", arguments)
    for names, command in commands(plan, ROOT / "slurm", test).items():
        print(f"\n{names}: {shlex.join(command)}", flush=True)
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        text = (
            "has what is needed" if status == 0 else f"lacks something, or got no job (srun: status {status})"
        )
        yield Finding(names, status == 0, text)
