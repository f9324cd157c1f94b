"""Answers on the disk: appended as they come, each line whole or absent, put together at the end.

Every process writes a file of its own, `answers-<host>-<process>-<time>.jsonl`, forced to the disk after each
batch. What is in any of them is not asked again, whoever asked it: after kill -9, with another number of
shards, or beside another job.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from llava_ext.files import atomic_path
from workflow_scripts.evaluate.asking import Answer
from workflow_scripts.evaluate.conditions import Condition
from workflow_scripts.evaluate.pace import note_pace
from workflow_scripts.evaluate.tasks.task import Question
from workflow_scripts.io import UserError

Key = tuple[str, str, int]
"""Question's name, condition, seed."""
TABLE = "predictions.parquet"


def key_of(question: Question, condition: Condition) -> Key:
    """What an answer is found by."""
    return question.name, condition.name, condition.seed


class AnswerFile:
    """The file that this process appends to."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.name = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        self.stream: IO[str] = (folder / f"answers-{self.name}.jsonl").open("x", encoding="utf-8")
        self.answers, self.opened = 0, time.monotonic()

    def append(self, questions: Sequence[Question], condition: Condition, answers: Sequence[Answer]) -> None:
        """Adds a batch; it is on the disk when this returns."""
        lines = [
            json.dumps([*key_of(question, condition), said.prompt, said.text, said.raw, said.tokens])
            for question, said in zip(questions, answers, strict=True)
        ]
        self.stream.write("".join(f"{line}\n" for line in lines))
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.answers += len(answers)

    def close(self) -> None:
        """Ends the file, and notes how long its answers took."""
        self.stream.close()
        if self.answers:
            note_pace(self.folder, self.name, self.answers, time.monotonic() - self.opened)


def read_answers(folder: Path) -> dict[Key, Answer]:
    """All answers that lie in the folder; a line that a killed process left half written is no answer."""
    found: dict[Key, Answer] = {}
    for path in sorted(folder.glob("answers-*.jsonl")):
        for line in _whole_lines(path):
            name, condition, seed, *said = json.loads(line)
            found.setdefault((name, condition, seed), Answer(*said))
    return found


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                yield line


def missing(
    questions: Iterable[Question], conditions: Sequence[Condition], answers: dict[Key, Answer]
) -> list[Question]:
    """The questions that some condition has not been answered for."""
    return [item for item in questions if any(key_of(item, c) not in answers for c in conditions)]


def write_table(
    folder: Path, questions: Sequence[Question], conditions: Sequence[Condition], answers: dict[Key, Answer]
) -> Path:
    """Writes one row a question and condition, whole or not at all, then deletes what it was made from.

    Raises:
        UserError: an answer is missing.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if lacking := missing(questions, conditions, answers):
        raise UserError(
            f"{folder}: {len(lacking)} of {len(questions)} questions have no answer, e.g."
            f" {lacking[0].name!r}; delete the files `shard-*` beside it and start again"
        )
    rows = [_row(item, condition, answers) for condition in conditions for item in questions]
    path = folder / TABLE
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), temporary)
    for part in folder.glob("answers-*.jsonl"):
        part.unlink()
    return path


def _row(question: Question, condition: Condition, answers: dict[Key, Answer]) -> dict[str, Any]:
    said = answers[key_of(question, condition)]
    return {
        "question": question.name,
        "question_digest": question.digest,
        "picture": question.image,
        "stratum": question.type,
        "text": question.text,
        "right": list(question.answers),
        "choices": list(question.choices),
        "condition": condition.name,
        "seed": condition.seed,
        "prompt_digest": said.prompt,
        "answer": said.text,
        "raw": said.raw,
        "tokens": said.tokens,
    }


def _schema() -> Any:
    import pyarrow as pa

    texts = ["question", "question_digest", "picture", "stratum", "text"]
    said = ["prompt_digest", "answer", "raw"]
    return pa.schema(
        [(name, pa.string()) for name in texts]
        + [("right", pa.list_(pa.string())), ("choices", pa.list_(pa.string()))]
        + [("condition", pa.string()), ("seed", pa.int32())]
        + [(name, pa.string()) for name in said]
        + [("tokens", pa.list_(pa.int32()))]
    )
