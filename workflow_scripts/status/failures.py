"""Why trainings have failed, for the last lines of a workflow."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

from workflow_scripts.status.read import Status, all_statuses

STATES = ("verdict", "ended", "refused", "failed", "killed", "interrupted")


def failures(root: Path, runs: Collection[tuple[str, str]]) -> list[Status]:
    """The trainings among ``runs`` (stage and name) that ended without being finished."""
    return [item for item in all_statuses(root) if item.state in STATES and (item.stage, item.run) in runs]


def say_failures(root: Path, runs: Collection[tuple[str, str]]) -> None:
    """Prints each with its reason and its log. Called at the end of a workflow that failed."""
    for item in failures(root, runs):
        saved = f"saved at step {item.saved_step}; the same command continues there"
        print(f"\n{item.stage} {item.run}: {item.state}: {item.reason or saved}", file=sys.stderr)
        if item.log:
            print(f"  log: {item.log}", file=sys.stderr)
