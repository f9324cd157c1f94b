"""Gives an experiment's diagnoses a readable name: `experiments/<experiment>/diagnostics.json`.

    python -m workflow_scripts.diagnose.link --experiment E --diagnoses MANIFEST... --output FILE

The file has what the manifests say by task, and where the tables lie, relative to itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow_scripts.command_line import command_line
from workflow_scripts.diagnose.step import TABLE
from workflow_scripts.io import read_json, user_errors, write_json


def link_diagnoses(experiment: str, diagnoses: Sequence[Path], output: Path) -> dict[str, Any]:
    """Writes the file and returns its content."""
    output.parent.mkdir(parents=True, exist_ok=True)
    here, tasks = output.parent.resolve(), {}
    for manifest in diagnoses:
        found = read_json(manifest)
        table = (manifest.parent / found["folder"] / TABLE).resolve()
        tasks[found["task"]] = found | {"table": os.path.relpath(table, here)}
    result = {"experiment": experiment, "diagnostics": tasks}
    write_json(output, result)
    return result


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Names one experiment's diagnoses."""
    paths = {"output": "the file, to be written"}
    parser = command_line("diagnose.link", __doc__, {"experiment": "the experiment's name"}, paths)
    parser.add_argument("--diagnoses", nargs="+", type=Path, required=True, help="manifests of diagnoses")
    options = parser.parse_args(argv)
    link_diagnoses(options.experiment, options.diagnoses, options.output)


if __name__ == "__main__":
    main()
