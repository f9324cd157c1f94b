"""A task of lmms-eval over local files. Runs in the environment that has lmms-eval (`make env-evaluation`).

Only the task is used: its questions, prompts, pictures and metrics. Not its runner, whose exit status is 0
when answers are missing, and not its cache, which keeps answers of former weights.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_ext.files import sha256
from workflow_scripts.config.lmms import LmmsSpec, PictureTableSpec
from workflow_scripts.evaluate.lmms import VERSION
from workflow_scripts.io import UserError, digest, read_json

MODEL = "llava_hf"
"""Whose variant of a prompt is asked for, where a task tells models apart."""
ADVICE = "make env-evaluation"


@dataclass(frozen=True)
class LoadedTask:
    """A task with its documents."""

    spec: LmmsSpec
    task: Any
    code: str
    """Digest of the task's YAML and Python files."""
    pictures: Mapping[str, bytes] | None

    @cached_property
    def documents(self) -> Any:
        """The rows that are asked about, without pictures unless the metric looks at them."""
        return self.task.eval_docs_no_media

    def about(self) -> dict[str, Any]:
        """What is recorded with every number."""
        return {"version": VERSION, "task": self.spec.task, "task_digest": self.code}


@contextmanager
def loaded_task(spec: LmmsSpec, source: Path, scratch: Path) -> Iterator[LoadedTask]:
    """Loads the task over the source's files; what libraries keep for themselves lies below ``scratch``
    meanwhile.

    Raises UserError for another lmms-eval, an unknown task, and tasks that this adapter can't ask.
    """
    _check_version()
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".lmms-", dir=scratch) as folder:
        # Before lmms-eval and datasets are imported: nothing may come from elsewhere than the source.
        os.environ.update(
            HF_HUB_OFFLINE="1",
            HF_DATASETS_OFFLINE="1",
            LMMS_EVAL_DATASETS_CACHE=folder,
            HF_DATASETS_CACHE=folder,
        )
        yield _load(spec, source, folder)


def _check_version() -> None:
    try:
        found = importlib.metadata.version("lmms_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"lmms-eval is not installed in this environment; run: {ADVICE}") from None
    if found != VERSION:
        raise UserError(f"lmms-eval {found} is installed, {VERSION} is needed; run: {ADVICE}")


def _load(spec: LmmsSpec, source: Path, folder: str) -> LoadedTask:
    import lmms_eval.tasks
    from lmms_eval.api.task import ConfigurableTask
    from lmms_eval.utils import load_yaml_config

    path = find_definition(spec.task, Path(lmms_eval.tasks.__file__).parent)
    config = load_yaml_config(str(path))
    _check_kind(spec.task, config)
    files = source_files(source, spec.files)
    split = config.get("test_split") or config.get("validation_split")
    options = {"data_files": {split: [str(file) for file in files]}, "features": _features(files[0])}
    config |= {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": options}
    config["lmms_eval_specific_kwargs"] = _prompt(spec, config.get("lmms_eval_specific_kwargs"))
    if spec.pictures:
        config["process_docs"] = None  # it would fetch the pictures itself
    task = ConfigurableTask(config=config, model_name=MODEL)
    task.args = SimpleNamespace(output_path=folder)
    pictures = read_pictures(spec.pictures, source) if spec.pictures else None
    return LoadedTask(spec, task, _code_digest(path), pictures)


def find_definition(name: str, root: Path) -> Path:
    """The YAML file of a task; lmms-eval's own index of all of them takes its time."""
    line = re.compile(rf"^task:\s*[\"']?{re.escape(name)}[\"']?\s*(?:#.*)?$", re.M)
    found = [path for path in sorted(root.rglob("*.yaml")) if line.search(path.read_text(encoding="utf-8"))]
    if not found:
        raise UserError(
            f"lmms.task: {name!r} is no task of lmms-eval {VERSION}; `python -m lmms_eval eval --tasks list`"
            " in its environment lists them (name a task, not a group)"
        )
    return found[0]


def _check_kind(name: str, config: Mapping[str, Any]) -> None:
    unfit = {
        "asks for something else than an answer in words": config.get("output_type") != "generate_until",
        "is a class of Python code": "class" in config,
        "scores a question by all others": bool(config.get("full_docs")),
        "shows examples first": bool(config.get("num_fewshot")),
    }
    for what, is_so in unfit.items():
        if is_so:
            raise UserError(f"lmms.task: {name} {what}, which this workflow can't ask; choose another task")


def _prompt(spec: LmmsSpec, known: dict[str, Any] | None) -> dict[str, Any] | None:
    """The task's variants of its prompt, with the settings of ours in the one that is used."""
    if not spec.prompt:
        return known
    used = MODEL if MODEL in (known or {}) else "default"
    options = (known or {}).get(used) or {}
    if unknown := sorted(spec.prompt.keys() - options.keys()):
        raise UserError(
            f"lmms.prompt: {spec.task} has no setting {unknown[0]!r}; it has: {', '.join(options) or 'none'}"
        )
    return {**(known or {}), used: {**options, **spec.prompt}}


def source_files(source: Path, pattern: str) -> list[Path]:
    """The source's annotation files whose paths end as ``pattern``. Raises UserError where there is none, or
    one that is no parquet file.
    """
    listed = [source.parent / item["path"] for item in read_json(source)["annotations"]]
    found = [path for path in listed if path.match(pattern)]
    if not found:
        raise UserError(
            f"{source}: no annotation file ends as {pattern!r}; there are: {', '.join(map(str, listed))}"
        )
    for path in found:
        if path.suffix != ".parquet":
            raise UserError(f"{path}: kind: lmms reads parquet files; name others with lmms.files")
        _check_parquet(path)
    return found


def _check_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        pq.read_schema(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: can't be read as parquet ({error}); fetch or write it again") from None


def _features(path: Path) -> Any:
    """The columns of a file, with pictures as pictures, also where the file does not say that they are."""
    import pyarrow.parquet as pq
    from datasets import Features, Image, List

    found = Features.from_arrow_schema(pq.read_schema(path))
    for name, kind in found.items():
        inner = getattr(kind, "feature", kind)
        if isinstance(inner, dict) and inner.keys() == {"bytes", "path"}:
            found[name] = List(Image()) if inner is not kind else Image()
    return found


def read_pictures(spec: PictureTableSpec, source: Path) -> dict[str, bytes]:
    """Pictures by name, from files of their own."""
    import pyarrow.parquet as pq

    found = {}
    for path in source_files(source, spec.files):
        for row in pq.read_table(path, columns=[spec.name, spec.picture]).to_pylist():
            found[str(row[spec.name])] = bytes(row[spec.picture]["bytes"])
    return found


def _code_digest(path: Path) -> str:
    """Of all that a task is made of: the files of its folder and what tasks share."""
    shared = path.parents[1] / "_task_utils"
    files = [file for folder in (path.parent, shared) for file in sorted(folder.glob("*")) if file.is_file()]
    return digest([path.name, {file.name: sha256(file) for file in files}], 16)


@contextmanager
def no_network(what: str) -> Iterator[None]:
    """Raises UserError when a connection to another machine was tried meanwhile: that of a paid judge."""
    tried: list[Any] = []
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple):
            tried.append(address[0])
            raise OSError("no network in scoring")
        connect(self, address)

    socket.socket.connect = refuse  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        socket.socket.connect = connect  # type: ignore[method-assign]
        if tried:
            raise UserError(
                f"{what} asks another machine ({tried[0]}) for its scores, a judge perhaps; this workflow"
                " asks none: choose a task that is scored by rules (its name often ends in _static)"
            ) from None


def answers_of(task: Any, documents: Sequence[Any], answers: Sequence[str]) -> list[Any]:
    """The answers behind the task's first filter, as its metrics get them."""
    instances = [
        SimpleNamespace(resps=[answer], filtered_resps={}, doc=document)
        for answer, document in zip(answers, documents, strict=True)
    ]
    first = task._filters[0]
    first.apply(instances, documents)
    return [item.filtered_resps[first.name] for item in instances]


def right_answers(loaded: LoadedTask, document: Mapping[str, Any]) -> tuple[str, ...]:
    """The right answer to a question, or those that people gave: of the named column, or the task's."""
    answer = loaded.spec.answer
    found = document[answer] if answer else loaded.task.doc_to_target(document)
    return tuple(map(str, found)) if isinstance(found, list | tuple) else (str(found),)
