"""Tasks of lmms-eval, as the step `evaluate.lmms.questions` wrote them: a table and an archive of pictures.

Reading them needs no lmms-eval, so predictions and diagnostics run in the environment of trainings.
"""

from __future__ import annotations

from pathlib import Path

from workflow_scripts.config.question_fields import FieldsSpec
from workflow_scripts.evaluate.tasks.stores import stored_pictures
from workflow_scripts.evaluate.tasks.task import Question, Task
from workflow_scripts.io import read_json


def read_prepared(prepared: Path, fields: FieldsSpec | None = None) -> list[Question]:
    """The questions of a manifest that the step wrote."""
    import pyarrow.parquet as pq

    [annotation] = read_json(prepared)["annotations"]
    rows = pq.read_table(prepared.parent / annotation["path"]).to_pylist()
    return [Question(**{**row, "answers": tuple(row["answers"])}) for row in rows]


LMMS = Task("lmms", read_prepared, stored_pictures, prepared=True)
