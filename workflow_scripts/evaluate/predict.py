"""Asks an exported checkpoint the questions of a task, greedily, and keeps every answer.

    python -m workflow_scripts.evaluate.predict --task NAME --spec JSON \\
        --checkpoint runs/export/R/manifest.json --source data/sources/S/manifest.json \\
        --manifest runs/predict/P/manifest.json [--shard 0 --of 4 --note FILE]

Each question is asked under every condition of the task: `normal`; `permuted`, where the picture's vision
tokens reach the language model in a random order (same content, no order); `blank`, where the picture is one
plain colour, which shows what can be guessed without seeing; `text_only`, without a picture. The checkpoint
is loaded once, as any user would load it. `predictions.parquet`, in the folder that the manifest names, has
one row a question and condition.

What is answered is on the disk after each batch and is not asked again. With `--shard` the job answers its
part of the questions and writes a note; without, it answers what is left and puts all together.
"""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from llava_ext.files import sha256
from workflow_scripts.command_line import command_line, read_spec
from workflow_scripts.config.evaluation import TaskSpec
from workflow_scripts.evaluate.answers import TABLE, AnswerFile, key_of, missing, read_answers, write_table
from workflow_scripts.evaluate.asking import Chunk, answer, decode_picture
from workflow_scripts.evaluate.checkpoint import Checkpoint, load_checkpoint, private_module_cache
from workflow_scripts.evaluate.conditions import conditions_of
from workflow_scripts.evaluate.harness import harness
from workflow_scripts.evaluate.questions import read_questions
from workflow_scripts.evaluate.tasks import TASKS
from workflow_scripts.evaluate.tasks.task import Pictures, Question
from workflow_scripts.io import digest, progress, read_json, user_errors, write_json

ABOUT = "about.json"


def state_folder(spec: TaskSpec, checkpoint: Path, source: Path, manifest: Path) -> Path:
    """Where the answers lie: another checkpoint, source, prompt or harness has another folder."""
    content = {
        "checkpoint": read_json(checkpoint)["digest"],
        "source": read_json(source)["digest"],
        "asked": spec.asked(),
        "harness": harness(),
    }
    return manifest.parent / digest(content, 10)


def share_of(questions: Sequence[Question], shard: int, of: int) -> Sequence[Question]:
    """The questions of one job; those about one picture stay together where they stand together."""
    return questions[shard * len(questions) // of : (shard + 1) * len(questions) // of]


def ask_missing(
    spec: TaskSpec, checkpoint: Path, source: Path, folder: Path, questions: Sequence[Question]
) -> int:
    """Asks what has no answer yet; returns how many questions that were. Loads no model for nothing."""
    answers = read_answers(folder)
    left = missing(questions, conditions_of(spec.conditions), answers)
    if not left:
        return 0
    with TASKS[spec.kind].pictures(source, spec.fields, left) as pictures, private_module_cache():
        loaded = load_checkpoint(checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / ABOUT, {"loaded_with": loaded.loaded_with, "versions": versions()})
        file = AnswerFile(folder)
        try:
            starts = range(0, len(left), spec.batch_size)
            for start in progress(starts, len(starts), f"asking {len(left)} questions, batches"):
                _ask_batch(spec, loaded, left[start : start + spec.batch_size], pictures, file, answers)
        finally:
            file.close()
    return len(left)


def _ask_batch(
    spec: TaskSpec,
    loaded: Checkpoint,
    questions: Sequence[Question],
    pictures: Pictures,
    file: AnswerFile,
    known: Container[Any],
) -> None:
    names = dict.fromkeys(item.image for item in questions)
    chunk = Chunk(questions, {name: decode_picture(name, pictures(name)) for name in names})
    for condition in conditions_of(spec.conditions):
        asked = [item for item in questions if key_of(item, condition) not in known]
        if asked:
            file.append(asked, condition, answer(loaded, chunk, asked, condition, spec))


def versions() -> dict[str, str]:
    """Of the libraries that made the answers."""
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def predict(
    task: str, spec: TaskSpec, checkpoint: Path, source: Path, manifest: Path, shards: int = 1
) -> dict[str, Any]:
    """Answers what is left (nothing where several ``shards`` did), puts the answers together and writes the
    manifest.
    """
    folder = state_folder(spec, checkpoint, source, manifest)
    questions, begin = read_questions(spec, source), time.monotonic()
    table = folder / TABLE
    if not table.is_file():
        if shards == 1:
            asked = ask_missing(spec, checkpoint, source, folder, questions)
            seconds = time.monotonic() - begin
            print(f"{asked} of {len(questions)} questions asked in {seconds:.1f} s", flush=True)
        conditions = conditions_of(spec.conditions)
        table = write_table(folder, questions, conditions, read_answers(folder))
    exported, described = read_json(checkpoint), read_json(source)
    result = {
        "run": manifest.parent.name,
        "task": task,
        "folder": folder.name,
        "questions": len(questions),
        "pictures": len({item.image for item in questions}),
        "digest": sha256(table),
        "checkpoint": {"run": exported["run"], "digest": exported["digest"]} | read_json(folder / ABOUT),
        "interventions": exported["interventions"],
        "source": {"name": described["name"], "digest": described["digest"]},
        "harness": harness(),
        "asked": spec.asked(),
        **({"lmms_eval": described["lmms_eval"]} if TASKS[spec.kind].prepared else {}),
    }
    write_json(manifest.with_name("shards.json"), {"shards": shards})
    write_json(manifest, result)
    return result


def predict_shard(
    spec: TaskSpec, checkpoint: Path, source: Path, run: Path, shard: int, of: int, note: Path
) -> None:
    """Answers one job's part of the questions; ``run`` is the manifest that will be."""
    folder = state_folder(spec, checkpoint, source, run)
    questions = share_of(read_questions(spec, source), shard, of)
    if not (folder / TABLE).is_file():
        ask_missing(spec, checkpoint, source, folder, questions)
    write_json(note, {"shard": shard, "of": of, "questions": len(questions), "folder": folder.name})


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Asks one checkpoint one task's questions."""
    paths = {
        "checkpoint": "the manifest of an export",
        "source": "the manifest of the source with the questions",
        "manifest": "the manifest of the predictions, to be written",
    }
    texts = {"task": "the task's name", "spec": "its section of `evaluation.tasks`, as JSON"}
    parser = command_line("evaluate.predict", __doc__, texts, paths)
    parser.add_argument("--shard", type=int, help="answer this part alone, from 0")
    parser.add_argument("--of", type=int, default=1, help="number of parts")
    parser.add_argument("--note", type=Path, help="with --shard: the file that says that the part is done")
    parser.add_argument("--shards", nargs="*", default=[], help="without --shard: the notes of all parts")
    options = parser.parse_args(argv)
    spec = read_spec(TaskSpec, options.spec)
    given = (spec, options.checkpoint, options.source, options.manifest)
    if options.shard is None:
        predict(options.task, *given, shards=len(options.shards) or 1)
    else:
        predict_shard(*given, options.shard, options.of, options.note)


if __name__ == "__main__":
    main()
