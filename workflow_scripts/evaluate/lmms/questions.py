"""Writes the questions of a task of lmms-eval, as the task itself words and shows them.

    python -m workflow_scripts.evaluate.lmms.questions --name NAME --spec JSON \\
        --source data/sources/S/manifest.json --manifest data/questions/Q/manifest.json

Runs in the environment that has lmms-eval. Writes `questions.parquet` and `pictures.zip` beside the manifest,
from which the answers are asked for without lmms-eval. Each row of the task is one question, or the step
fails.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_ext.files import atomic_path
from workflow_scripts.command_line import command_line, read_spec
from workflow_scripts.config.lmms import LmmsSpec
from workflow_scripts.evaluate.lmms.task import LoadedTask, loaded_task, right_answers
from workflow_scripts.evaluate.tasks.task import Question
from workflow_scripts.io import UserError, digest, progress, read_json, user_errors, write_json

if TYPE_CHECKING:
    from PIL import Image

TABLE, PICTURES = "questions.parquet", "pictures.zip"


class PictureArchive:
    """Pictures under the names of their content, each once, not compressed once more."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        self.names: set[str] = set()

    def add(self, data: bytes) -> str:
        """The picture's name."""
        name = hashlib.sha256(data).hexdigest()[:16]
        if name not in self.names:
            self.names.add(name)
            self.archive.writestr(zipfile.ZipInfo(name), data)
        return name


def cells_with_pictures(row: Mapping[str, Any]) -> Iterator[bytes]:
    """The picture files that lie in a row as it is stored."""
    for value in row.values():
        for cell in value if isinstance(value, list) else [value]:
            if isinstance(cell, Mapping) and isinstance(cell.get("bytes"), bytes):
                yield cell["bytes"]


def file_of(shown: Image.Image, stored: Mapping[str, Any]) -> bytes:
    """The stored file that has these pixels, or a new one: what a task turns or crops is shown so."""
    from PIL import Image

    for data in cells_with_pictures(stored):
        with Image.open(io.BytesIO(data)) as picture:
            plain = picture.convert("RGB")
        if plain.size == shown.size and plain.tobytes() == shown.convert("RGB").tobytes():
            return data
    stream = io.BytesIO()
    shown.convert("RGB").save(stream, "PNG")
    return stream.getvalue()


def picture_of(loaded: LoadedTask, place: int) -> bytes:
    """The picture of a question. Raises UserError unless there is exactly one."""
    where = f"lmms.task: {loaded.spec.task}, question {place}"
    document = loaded.task.eval_docs[place]
    if loaded.spec.pictures is not None and loaded.pictures is not None:
        name = str(document[loaded.spec.pictures.question])
        if name not in loaded.pictures:
            raise UserError(f"{where}: there is no picture {name}, see lmms.pictures")
        return loaded.pictures[name]
    shown = loaded.task.doc_to_visual(document) or []
    if len(shown) != 1 or not hasattr(shown[0], "convert"):
        raise UserError(f"{where}: asks about {len(shown)} pictures; tasks with one picture can be asked")
    stored = loaded.task.eval_docs.with_format("arrow")[place].to_pylist()[0]
    return file_of(shown[0], stored)


def question_of(loaded: LoadedTask, place: int, picture: str) -> Question:
    """A question as the task words it; its name is its place, by which the task scores it."""
    spec, document = loaded.spec, loaded.documents[place]
    for column in (spec.stratum, spec.answer):
        if column is not None:
            _check_column(loaded, column)
    return Question(
        name=str(place),
        image=picture,
        type=str(document[spec.stratum]) if spec.stratum else "all",
        text=loaded.task.fewshot_context(document, 0),
        answers=right_answers(loaded, document),
    )


def chosen_places(loaded: LoadedTask) -> list[int]:
    """The places of the questions that are asked, in the task's order."""
    only, documents = loaded.spec.only, loaded.documents
    for column in only:
        _check_column(loaded, column)
    columns = [documents[column] for column in only]
    rows = zip(*columns, strict=True) if only else [()] * len(documents)
    return [place for place, row in enumerate(rows) if list(row) == list(only.values())]


def _check_column(loaded: LoadedTask, column: str) -> None:
    known = loaded.documents.column_names
    if column not in known:
        raise UserError(f"lmms: {loaded.spec.task} has no column {column!r}; columns: {', '.join(known)}")


def write_questions(loaded: LoadedTask, folder: Path) -> list[Question]:
    """Writes all pictures, then the table; returns the questions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    chosen = chosen_places(loaded)
    with (
        atomic_path(folder / PICTURES) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):
        pictures = PictureArchive(archive)
        places = progress(chosen, len(chosen), f"reading {loaded.spec.task}, questions")
        questions = [question_of(loaded, i, pictures.add(picture_of(loaded, i))) for i in places]
    texts = [(name, pa.string()) for name in ("name", "image", "type", "text")]
    schema = pa.schema([*texts, ("answers", pa.list_(pa.string()))])
    rows = [{name: asdict(item)[name] for name in schema.names} for item in questions]
    with atomic_path(folder / TABLE) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)
    return questions


def prepare(name: str, spec: LmmsSpec, source: Path, manifest: Path) -> dict[str, Any]:
    """Writes the questions and the manifest, which has the form of a source's."""
    with loaded_task(spec, source, manifest.parent) as loaded:
        questions = write_questions(loaded, manifest.parent)
        about = loaded.about()
    described = read_json(source)
    result = {
        "name": name,
        "questions": len(questions),
        "digest": digest([item.digest for item in questions]),
        "images": {"type": "zip", "path": PICTURES},
        "annotations": [{"path": TABLE, "role": "annotations"}],
        "lmms_eval": about,
        "source": {"name": described["name"], "digest": described["digest"]},
    }
    write_json(manifest, result)
    return result


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Writes one task's questions."""
    paths = {
        "source": "the manifest of the source with the task's files",
        "manifest": "the manifest of the questions, to be written",
    }
    texts = {"name": "what the questions are called", "spec": "the task's section `lmms`, as JSON"}
    options = command_line("evaluate.lmms.questions", __doc__, texts, paths).parse_args(argv)
    result = prepare(options.name, read_spec(LmmsSpec, options.spec), options.source, options.manifest)
    print(f"{result['questions']} questions of {result['lmms_eval']['task']}", flush=True)


if __name__ == "__main__":
    main()
