"""Gives a task's scores an experiment's name: `experiments/<experiment>/evaluation/<task>.json`.

    python -m workflow_scripts.evaluate.link --experiment E --scores runs/score/S/manifest.json --output FILE

The file has all that the scores' manifest says, and where the rows lie, relative to itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow_scripts.command_line import command_line
from workflow_scripts.io import read_json, user_errors, write_json


def link_scores(experiment: str, scores: Path, output: Path) -> dict[str, Any]:
    """Writes the file and returns its content."""
    found = read_json(scores)
    predictions = scores.parents[2] / "predict" / found["predictions"]["run"] / found["predictions"]["folder"]
    rows = {
        "scores": scores.with_name("scores.parquet"),
        "predictions": predictions / "predictions.parquet",
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    here = output.parent.resolve()
    paths = {name: os.path.relpath(path.resolve(), here) for name, path in rows.items()}
    result = {"experiment": experiment, **found, "paths": paths}
    write_json(output, result)
    return result


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Names one experiment's scores of one task."""
    paths = {"scores": "the manifest of the scores", "output": "the file, to be written"}
    options = command_line(
        "evaluate.link", __doc__, {"experiment": "the experiment's name"}, paths
    ).parse_args(argv)
    link_scores(options.experiment, options.scores, options.output)


if __name__ == "__main__":
    main()
