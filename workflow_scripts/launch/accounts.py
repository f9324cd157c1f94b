"""Keeps Snakemake's Slurm plugin from guessing an account where the site names none.

Its guess calls `sacct` with arguments that `sacct` refuses, on every cluster, and warns three times. Without
an account on the command line `sbatch` uses the user's default one, which is what a guess could find at best.
"""

from __future__ import annotations

from typing import Any


def use_default_account(workflow: Any) -> None:
    """Jobs without `slurm_account` are submitted without an account. To be called before the first job."""
    executor: Any = getattr(workflow.scheduler, "_executor", None)
    if getattr(executor, "_fallback_account_arg", "") is None:
        executor._fallback_account_arg = ""
