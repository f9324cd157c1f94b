"""Where a checkpoint comes from: configuration, code, packages, data, machine."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from workflow_scripts.launch.preflight import versions, visible_gpus

ROOT = Path(__file__).parents[2]


def git_state(root: Path = ROOT) -> dict[str, Any]:
    """The commit of the code, and whether it was changed since; empty outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return {}
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.smk", "Snakefile")
    return {
        "commit": commit,
        "changed_files": [line.split(maxsplit=1)[-1] for line in (changed or "").splitlines()],
    }


def hardware(with_gpus: bool) -> dict[str, Any]:
    """The machine: processor, memory, and the GPUs where the training used some."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model
        )
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        memory = 0
    return {
        "host": platform.node(),
        "cpu": model,
        "cpus": os.cpu_count(),
        "memory_bytes": memory,
        "gpus": list(visible_gpus().names) if with_gpus else [],
    }


def packages() -> dict[str, str]:
    """All installed packages with their versions."""
    found = {str(item.metadata["Name"]): item.version for item in distributions() if item.metadata["Name"]}
    return dict(sorted(found.items()))


def provenance(
    spec: Mapping[str, Any], digests: Mapping[str, str], command: list[str], result: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything about a finished training that is worth keeping beside its weights."""
    recipe, compute = spec["recipe"], spec["compute"]
    return {
        "stage": spec["stage"],
        "run": spec["run"],
        "configuration": dict(spec),
        "global_batch_size": recipe["global_batch_size"],
        "processes": compute["nodes"] * (compute["processes_per_node"] or max(1, compute["gpus_per_node"])),
        "inputs": dict(digests),
        "command": command,
        "code": {"version": spec["code_version"], **git_state()},
        "versions": versions(),
        "packages": packages(),
        "hardware": hardware(bool(spec["compute"]["gpus_per_node"])),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "metrics": result.get("metrics", {}),
        "step": result.get("step"),
        "skipped": result.get("skipped", []),
        "finished": time.time(),
    }
