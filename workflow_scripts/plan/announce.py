"""What is said when everything is done."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from workflow_scripts.io import read_json
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plan.skipped import lines_of_others
from workflow_scripts.report.table import text_table


def announce(plan: Plan) -> None:
    """Prints where the results are. Called at the end of a successful run."""
    lines = []
    for name in plan.checkpoints:
        folder = Path("experiments") / name
        if (folder / "checkpoint.json").is_file():
            lines.append(f"  {name:<24} {folder}/hf")
    if lines:
        print(
            "\ncheckpoints (checkpoint.json beside each says what it is):", *lines, sep="\n", file=sys.stderr
        )
    table = accuracy_table(plan)
    if table:
        print("\naccuracy in %:", table, sep="\n", file=sys.stderr)
    for line in lines_of_others(plan):
        print(f"\n{line}", file=sys.stderr)
    if Path("report/index.html").is_file():
        print(f"\nreport: {Path('report/index.html').absolute()}\n", file=sys.stderr)


def accuracy_table(plan: Plan) -> str:
    """The accuracies as text, a table a task; empty when there are none."""
    tasks: dict[str, dict[str, Any]] = {}
    for item in plan.evaluations.values():
        if Path(item.named).is_file():
            tasks.setdefault(item.task, {})[item.experiment] = read_json(Path(item.named))
    return text_table(tasks)
