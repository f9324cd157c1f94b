"""What is said when everything is done."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from workflow_scripts.io import read_json
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plan.skipped import lines_of_others
from workflow_scripts.report.table import text_table


def announce(plan: Plan) -> None:
    """Prints where the results are. Called at the end of a successful run."""
    lines = []
    for name in plan.experiments:
        folder = Path("experiments") / name
        if (folder / "checkpoint.json").is_file():
            lines.append(f"  {name:<24} {folder}/hf")
    if lines:
        print(
            "\ncheckpoints (checkpoint.json beside each says what it is):", *lines, sep="\n", file=sys.stderr
        )
    table = accuracy_table(
        {name: run.manifest for (stage, name), run in plan.runs.items() if stage == "evaluate"}
    )
    if table:
        print(
            "\naccuracy in % (as is, vision tokens permuted, blank picture):",
            table,
            sep="\n",
            file=sys.stderr,
        )
    for line in lines_of_others(plan):
        print(f"\n{line}", file=sys.stderr)
    if Path("report/index.html").is_file():
        print(f"\nreport: {Path('report/index.html').absolute()}\n", file=sys.stderr)


def accuracy_table(manifests: Mapping[str, str]) -> str:
    """The evaluations' accuracies as a text table, one line an experiment; empty when there are none."""
    return text_table(
        {name: read_json(Path(path)) for name, path in manifests.items() if Path(path).is_file()}
    )
