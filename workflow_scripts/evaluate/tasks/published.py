"""2DS in the published form: parquet with one row a picture and its questions in `qa_pairs`."""

from __future__ import annotations

from pathlib import Path

from workflow_scripts.config.question_fields import FieldsSpec
from workflow_scripts.evaluate.tasks.shapes import question_of
from workflow_scripts.evaluate.tasks.stores import stored_pictures
from workflow_scripts.evaluate.tasks.task import Question, Task
from workflow_scripts.io import UserError, read_json


def read_published(source: Path, fields: FieldsSpec | None = None) -> list[Question]:
    """The questions of a source's parquet files."""
    import pandas

    from workflow_scripts.evaluate.two_d_shapes import records_of

    files = [source.parent / item["path"] for item in read_json(source)["files"]]
    tables = [path for path in files if path.suffix == ".parquet"]
    if not tables:
        raise UserError(f"{source}: has no parquet file; kind: two_d_shapes needs the published table of 2DS")
    try:
        found = [(path, records_of(pandas.read_parquet(path))) for path in tables]
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: a table can't be read as parquet ({error}); fetch it again") from None
    return [
        question_of(record, f"{path}, question {number}")
        for path, records in found
        for number, record in enumerate(records, 1)
    ]


TWO_D_SHAPES = Task("two_d_shapes", read_published, stored_pictures)
