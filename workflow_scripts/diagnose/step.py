"""Looks into an exported checkpoint while it reads a task's questions: norms, attention, rotary positions.

    python -m workflow_scripts.diagnose --name NAME --spec JSON --task JSON \\
        --checkpoint runs/export/R/manifest.json --source data/sources/S/manifest.json \\
        --manifest runs/diagnose/D/manifest.json

`--spec` is the section `diagnostics`, `--task` that of the task in `evaluation.tasks`. The first pictures of
the task are shown, each with its first question, as the evaluation shows them, and once more with their
vision tokens in a random order. `measures.parquet`, in the folder that the manifest names, has one row a
layer, head and measure: the mean, and of how many values. What they are: llava_ext/analysis/measures.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ext.files import atomic_path, sha256
from workflow_scripts.command_line import command_line, read_spec
from workflow_scripts.config.diagnostics import DiagnosticsSpec
from workflow_scripts.config.evaluation import TaskSpec
from workflow_scripts.diagnose.content import content_of
from workflow_scripts.evaluate.asking import decode_picture, prompt_batch, prompts_of
from workflow_scripts.evaluate.checkpoint import (
    Checkpoint,
    load_checkpoint,
    permuted_tokens,
    private_module_cache,
)
from workflow_scripts.evaluate.conditions import permutation_seed
from workflow_scripts.evaluate.questions import read_questions
from workflow_scripts.evaluate.tasks import TASKS
from workflow_scripts.evaluate.tasks.task import Pictures, Question
from workflow_scripts.io import UserError, digest, progress, read_json, user_errors, write_json

TABLE = "measures.parquet"


def questions_of(spec: DiagnosticsSpec, task: TaskSpec, source: Path) -> list[Question]:
    """The first question about each of the first pictures."""
    first: dict[str, Question] = {}
    fewer = task.model_copy(update={"pictures": spec.pictures, "expected_questions": None})
    for item in read_questions(fewer, source):
        first.setdefault(item.image, item)
    return list(first.values())


@dataclass(frozen=True)
class Shown:
    """The questions in batches, as the model takes them."""

    loaded: Checkpoint
    batches: list[list[Question]]
    pictures: Pictures
    permute_seed: int

    def __iter__(self) -> Iterator[dict[str, Any]]:
        model, processor = self.loaded.model, self.loaded.processor
        for questions in progress(self.batches, len(self.batches), "looking, batches"):
            images = [decode_picture(item.image, self.pictures(item.image)) for item in questions]
            batch = prompt_batch(processor, prompts_of(processor, questions), images)
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            yield inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}

    def permuted(self, number: int) -> Any:
        """A context in which the pictures of a batch reach the language model in their random orders."""
        seeds = [permutation_seed(self.permute_seed, item) for item in self.batches[number]]
        return permuted_tokens(self.loaded.model, seeds)


def look_into(spec: DiagnosticsSpec, task: TaskSpec, checkpoint: Path, source: Path) -> list[Any]:
    """The measurements. Raises UserError where the checkpoint can't be looked into."""
    questions = questions_of(spec, task, source)
    with TASKS[task.kind].pictures(source, task.fields, questions) as pictures, private_module_cache():
        from llava_ext.analysis.measures import measure

        size = spec.batch_size
        batches = [questions[start : start + size] for start in range(0, len(questions), size)]
        shown = Shown(load_checkpoint(checkpoint), batches, pictures, task.permute_seed)
        try:
            return measure(shown.loaded.model, shown, shown.permuted, spec.layers)
        except ValueError as error:
            raise UserError(f"{checkpoint}: {error}") from error


def write_table(path: Path, rows: Sequence[Any]) -> None:
    """Whole or not at all. Raises UserError for numbers that are none, which nobody should plot."""
    import pandas

    table = pandas.DataFrame([vars(row) for row in rows]).astype({"head": "Int64"})
    odd = Counter(table.measure[~table.value.map(_is_number)])
    if odd:
        raise UserError(
            f"{path}: not finite: {', '.join(sorted(odd))}; the checkpoint's weights or activations overflow"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        table[["layer", "head", "measure", "value", "count"]].to_parquet(temporary, index=False)


def _is_number(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def diagnose(
    name: str, spec: DiagnosticsSpec, task: TaskSpec, checkpoint: Path, source: Path, manifest: Path
) -> dict[str, Any]:
    """Measures what is not measured yet, writes table and manifest; returns the manifest."""
    exported, described = read_json(checkpoint), read_json(source)
    content = content_of(spec, task)
    state = {**content, "checkpoint": exported["digest"], "source": described["digest"]}
    table = manifest.parent / digest(state, 10) / TABLE
    if not table.is_file():
        write_table(table, look_into(spec, task, checkpoint, source))
    result = {
        "run": manifest.parent.name,
        "task": name,
        "folder": table.parent.name,
        "digest": sha256(table),
        "prompts": len(questions_of(spec, task, source)),
        "checkpoint": {"run": exported["run"], "digest": exported["digest"]},
        "interventions": exported["interventions"],
        "source": {"name": described["name"], "digest": described["digest"]},
        **content,
    }
    write_json(manifest, result)
    return result


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Looks into one checkpoint with one task's questions."""
    texts = {
        "name": "the task's name",
        "spec": "the section `diagnostics`, as JSON",
        "task": "the task's section of `evaluation.tasks`, as JSON",
    }
    paths = {
        "checkpoint": "the manifest of an export",
        "source": "the manifest of the source with the questions",
        "manifest": "the manifest of the diagnosis, to be written",
    }
    options = command_line("diagnose", __doc__, texts, paths).parse_args(argv)
    diagnose(
        options.name,
        read_spec(DiagnosticsSpec, options.spec),
        read_spec(TaskSpec, options.task),
        options.checkpoint,
        options.source,
        options.manifest,
    )


if __name__ == "__main__":
    main()
