"""Finished trainings that left out other samples than the configuration says today: they stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from workflow_scripts.io import UserError, read_json
from workflow_scripts.manifests import left_out
from workflow_scripts.plan.plan import Plan


def lines_of_others(plan: Plan) -> Iterator[str]:
    """One line for each of them."""
    for run in plan.trainings():
        try:
            records = left_out(read_json(Path(run.manifest)))
        except (UserError, OSError):
            continue
        mixture = plan.experiment_of(run.stage, run.name).stage(run.stage).mixture
        names = plan.config.mixtures[mixture].skip_samples
        if not _same(names, records):
            before = ", ".join(f"#{record['record']}" for record in records) or "nothing"
            yield (
                f"{run.stage} {run.name} is finished and left out {before}; mixtures.{mixture}.skip_samples"
                f" says {', '.join(names) or 'nothing'} today. To train it anew, delete {run.folder}"
            )


def _same(names: Sequence[str], records: Sequence[dict[str, Any]]) -> bool:
    known = [{f"#{record['record']}", str(record["id"])} for record in records]
    return all(any(name in pair for pair in known) for name in names) and all(
        pair & set(names) for pair in known
    )
