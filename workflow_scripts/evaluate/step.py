"""Asks an exported checkpoint the held-out questions and counts the right answers.

    python -m workflow_scripts.evaluate --spec JSON --checkpoint runs/export/R/manifest.json \\
        --source data/sources/S/manifest.json --manifest runs/evaluate/R/manifest.json

Each question is answered greedily under three conditions: `normal`; `permuted`, where each picture's vision
tokens reach the language model in a random order (same content, no order); and `blank`, where the picture is
one plain colour, which shows what can be guessed without seeing. The checkpoint is loaded as any user would:
with transformers' AutoProcessor and AutoModelForImageTextToText from the exported folder alone, and with the
code saved beside the weights where there are interventions.
"""

from __future__ import annotations

import base64
import io
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_ext.files import sha256
from workflow_scripts.archives import DamagedMember, Listing, StoreReader, list_members
from workflow_scripts.command_line import command_line, read_spec
from workflow_scripts.config.evaluation import EvaluationSpec
from workflow_scripts.evaluate.tasks import TASKS
from workflow_scripts.evaluate.tasks.task import Question, Task
from workflow_scripts.io import UserError, digest, progress, read_json, user_errors, write_json

if TYPE_CHECKING:
    import torch
    from PIL import Image

# A picture of more bytes is no picture of an evaluation.
MOST_BYTES = 1 << 28
CONDITIONS = ("normal", "permuted", "blank")


# ---- the source -----------------------------------------------------------------------------------------


def first_pictures(questions: Sequence[Question], number: int | None) -> list[Question]:
    """The questions about the first ``number`` pictures; all of them for None."""
    chosen = set(list(dict.fromkeys(question.image for question in questions))[:number])
    return [question for question in questions if question.image in chosen]


def read_pictures(source: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The pictures' file bytes by their name in the annotations.

    A name may begin with folders that the archive does not have (`coco/train2017/1.jpg` for
    `train2017/1.jpg`).
    """
    images = read_json(source)["images"]
    if images is None:
        raise UserError(f"{source}: the source has no pictures; evaluation.source needs one with pictures")
    path, kind = source.parent / images["path"], images["type"]
    listing = list_members(path, kind)
    rows = {name: row for row, name in enumerate(listing.names)}
    with StoreReader(path, kind) as reader:
        return {
            name: _picture(reader, listing, _row(name, rows, path), path) for name in dict.fromkeys(names)
        }


def _row(name: str, rows: Mapping[str, int], path: Path) -> int:
    parts = name.split("/")
    for start in range(len(parts)):
        if (row := rows.get("/".join(parts[start:]))) is not None:
            return row
    raise UserError(f"{path}: has no picture {name}; make the source again")


def _picture(reader: StoreReader, listing: Listing, row: int, path: Path) -> bytes:
    try:
        return reader.read(listing, row, MOST_BYTES).data
    except DamagedMember as error:
        raise UserError(f"{path}: {listing.names[row]}: {error}; make the source again") from None


# ---- the checkpoint -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    model: Any
    processor: Any
    loaded_with: str


def check_code(folder: Path, files: dict[str, str]) -> None:
    """Raises UserError unless every Python file in ``folder`` is one that the export wrote, unchanged."""
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if files.get(name) != sha256(path):
            raise UserError(
                f"{path}: not the file that the export wrote, so it is not run; delete the export's manifest"
                " and export again"
            )


def load_checkpoint(manifest: Path) -> Checkpoint:
    """Loads the exported HF folder with transformers alone; code saved beside the weights is checked
    first.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

    exported = read_json(manifest)
    folder = manifest.parent / exported["folders"]["hf"]
    stock = read_json(folder / "config.json")["model_type"] == "llava"
    if not stock:
        check_code(folder, exported["files"]["hf"])
    loader = LlavaForConditionalGeneration if stock else AutoModelForImageTextToText
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Any = torch.float32 if device == "cpu" else "auto"
    options = {} if stock else {"trust_remote_code": True}
    model, info = loader.from_pretrained(str(folder), dtype=dtype, output_loading_info=True, **options)
    wrong = {
        key: sorted(info[key])
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(key)
    }
    if wrong:
        raise UserError(f"{folder}: the weights do not fit the model: {wrong}; export the checkpoint again")
    processor = AutoProcessor.from_pretrained(str(folder), backend="pil", **options)
    name = type(model).__name__ + ("" if stock else ", code saved beside the weights")
    return Checkpoint(model.to(device).eval(), processor, name)


@contextmanager
def private_module_cache() -> Iterator[None]:
    """Code saved beside weights is copied into a cache before it is imported. This gives the process a cache
    of its own.

    Evaluations run side by side, and all exported folders have the same name. Only works before transformers
    is imported.
    """
    with tempfile.TemporaryDirectory(prefix="modules-") as folder:
        os.environ["HF_MODULES_CACHE"] = folder
        yield


@contextmanager
def permuted_tokens(model: Any, seeds: Sequence[int] | None) -> Iterator[None]:
    """While it lasts, image i's vision tokens come in the random order of ``seeds[i]``; None changes nothing.

    Models with interventions offer a hook behind their last vision step; in the stock model that is the
    projector.
    """
    if seeds is None:
        yield
        return
    import torch

    def shuffle(tokens: torch.Tensor) -> torch.Tensor:
        """``(images, tokens, hidden)``, each image in its own order."""
        orders = [
            torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        order = torch.stack(orders).to(tokens.device)
        return tokens.gather(1, order[..., None].expand_as(tokens))

    core = model.model
    if hasattr(core, "vision_token_hook"):
        core.vision_token_hook = shuffle
        try:
            yield
        finally:
            core.vision_token_hook = None
    else:
        handle = core.multi_modal_projector.register_forward_hook(
            lambda module, inputs, output: shuffle(output)
        )
        try:
            yield
        finally:
            handle.remove()


# ---- asking ---------------------------------------------------------------------------------------------


def prompt_batch(processor: Any, questions: Sequence[Question], pictures: Sequence[Image.Image]) -> Any:
    """Left-padded inputs of ``generate`` through the checkpoint's own chat template."""
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}],
            add_generation_prompt=True,
        )
        for question in questions
    ]
    return processor(
        text=prompts, images=list(pictures), padding=True, return_tensors="pt", add_special_tokens=True
    )


def answer_batch(
    checkpoint: Checkpoint, batch: Any, seeds: Sequence[int] | None, max_new_tokens: int
) -> list[str]:
    """Greedy answers as text."""
    import torch

    model, tokenizer = checkpoint.model, checkpoint.processor.tokenizer
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad(), permuted_tokens(model, seeds):
        output = model.generate(
            **inputs,
            do_sample=False,
            temperature=None,
            top_p=None,
            max_length=None,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def ask(
    checkpoint: Checkpoint, questions: Sequence[Question], pictures: dict[str, bytes], spec: EvaluationSpec
) -> dict[str, list[str]]:
    """The answers by condition, in the order of the questions."""
    from PIL import Image

    answers: dict[str, list[str]] = {condition: [] for condition in CONDITIONS}
    starts = range(0, len(questions), spec.batch_size)
    for start in progress(starts, len(starts), "asking"):
        chunk = questions[start : start + spec.batch_size]
        shown = [Image.open(io.BytesIO(pictures[question.image])).convert("RGB") for question in chunk]
        batch = prompt_batch(checkpoint.processor, chunk, shown)
        blank = prompt_batch(
            checkpoint.processor, chunk, [Image.new("RGB", image.size, spec.blank_colour) for image in shown]
        )
        seeds = [permutation_seed(spec.permute_seed, question) for question in chunk]
        for condition, inputs, order in (
            ("normal", batch, None),
            ("permuted", batch, seeds),
            ("blank", blank, None),
        ):
            answers[condition] += answer_batch(checkpoint, inputs, order, spec.max_new_tokens)
    return answers


def permutation_seed(seed: int, question: Question) -> int:
    """The seed of one question's permutation: the same for every checkpoint, whatever the batches."""
    return int(digest([seed, question.name], 12), 16)


# ---- counting -------------------------------------------------------------------------------------------


def accuracies(task: Task, questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """The share of right answers by question type."""
    right: dict[str, list[bool]] = {}
    for question, answer in zip(questions, answers, strict=True):
        right.setdefault(question.type, []).append(task.is_right(answer, question.answer))
    return {kind: round(sum(found) / len(found), 4) for kind, found in right.items()}


def counts(questions: Sequence[Question]) -> dict[str, int]:
    """The number of questions by type."""
    found: dict[str, int] = {}
    for question in questions:
        found[question.type] = found.get(question.type, 0) + 1
    return found


def thumbnail(data: bytes, side: int = 160) -> str:
    """A picture as a small data URI, for pages without other files."""
    from PIL import Image

    picture = Image.open(io.BytesIO(data)).convert("RGB")
    picture.thumbnail((side, side))
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def examples(
    questions: Sequence[Question], answers: dict[str, list[str]], pictures: dict[str, bytes], number: int
) -> list[dict[str, Any]]:
    """Some pictures with what was asked and answered; the same pictures for every checkpoint."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for i, question in enumerate(questions):
        row = {"type": question.type, "question": question.text, "answer": question.answer}
        rows.setdefault(question.image, []).append({**row, "answers": {c: answers[c][i] for c in CONDITIONS}})
    # One picture for each set of question types in turn, so that rare sets are shown too.
    kinds: dict[tuple[str, ...], list[str]] = {}
    for image, asked in rows.items():
        kinds.setdefault(tuple(row["type"] for row in asked), []).append(image)
    queues = sorted(kinds.values(), key=lambda images: -len(rows[images[0]]))
    chosen = [queue[i] for i in range(number) for queue in queues if i < len(queue)][:number]
    return [
        {"image": image, "thumbnail": thumbnail(pictures[image]), "questions": rows[image]}
        for image in chosen
    ]


def evaluate(spec: EvaluationSpec, checkpoint: Path, source: Path, manifest: Path) -> dict[str, Any]:
    """Runs the evaluation and writes its manifest."""
    task = TASKS[spec.task]
    questions = first_pictures(task.read(source), spec.pictures)
    pictures = read_pictures(source, [question.image for question in questions])
    exported, begin = read_json(checkpoint), time.monotonic()
    loaded = load_checkpoint(checkpoint)
    answers = ask(loaded, questions, pictures, spec)
    print(
        f"{len(questions)} questions under {len(CONDITIONS)} conditions in {time.monotonic() - begin:.1f} s",
        flush=True,
    )
    result = {
        "run": manifest.parent.name,
        "checkpoint": {
            "run": exported["run"],
            "digest": exported["digest"],
            "loaded_with": loaded.loaded_with,
        },
        "interventions": exported["interventions"],
        "source": {"name": read_json(source)["name"], "digest": read_json(source)["digest"]},
        "spec": spec.model_dump(mode="json"),
        "pictures": len(pictures),
        "question_types": list(counts(questions)),
        "questions": counts(questions),
        "chance": task.chance(questions),
        "accuracy": {condition: accuracies(task, questions, answers[condition]) for condition in CONDITIONS},
        "examples": examples(questions, answers, pictures, spec.examples),
    }
    write_json(manifest, result)
    return result


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates one checkpoint."""
    paths = {
        "checkpoint": "the manifest of an export",
        "source": "the manifest of the source with the questions",
        "manifest": "the evaluation's manifest, to be written",
    }
    texts = {"spec": "the config's section `evaluation`, as JSON"}
    options = command_line("evaluate", __doc__, texts, paths).parse_args(argv)
    spec = read_spec(EvaluationSpec, options.spec)
    with private_module_cache():
        result = evaluate(spec, options.checkpoint, options.source, options.manifest)
    for condition, found in result["accuracy"].items():
        cells = "  ".join(f"{kind} {100 * share:5.1f}" for kind, share in found.items())
        print(f"{condition:<9} {cells}", flush=True)


if __name__ == "__main__":
    main()
