"""Encodes every record of a mixture as training will, and says what it found, before a GPU is asked for.

    python -m workflow_scripts.survey --name S --spec '<JSON>' --mixture data/mixtures/M/manifest.json \\
        --models models/LLM/manifest.json models/TOWER/manifest.json --manifest data/surveys/S/manifest.json

One survey serves all trainings with the same mixture, language model, prompt version and length; within it,
each *layout* (how many tokens an image takes, and which) has its own numbers, computed from one pass over the
text. Beside the manifest lie `<key>.npy`, a row a sample (:data:`llava_ext.data.survey.MEASURED`), and
`<key>.json`, what was counted; both are named by content and used again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_ext.data.assembly import Collator
from llava_ext.data.samples import open_samples
from llava_ext.data.skipping import find_records
from llava_ext.data.survey import MEASURED, Measured, Surveyor
from llava_ext.errors import TrainingError
from llava_ext.files import atomic_path, sha256
from llava_ext.model.folders import image_config, load_tokenizer
from llava_ext.model.interventions import Interventions
from workflow_scripts.command_line import command_line
from workflow_scripts.io import Hiccup, UserError, digest, progress, read_json, user_errors, write_json
from workflow_scripts.survey.bounds import problems
from workflow_scripts.survey.facts import facts_of

CHUNK = 2048
"""Samples that a process measures at once."""


@dataclass(frozen=True)
class Layout:
    """How an image stands among the tokens, and who has it so.

    ``of``: towers and flags that come to the same.
    """

    key: str
    collator: Collator
    tokens_per_image: int
    of: list[dict[str, Any]]


@dataclass(frozen=True)
class Inputs:
    """The folders that a survey reads and the digests of their content."""

    mixture: Path
    llm: Path
    towers: Mapping[str, Path]
    digests: Mapping[str, str]
    skipped: Sequence[int] = ()


def read_inputs(mixture: Path, models: Sequence[Path], skip_samples: str = "") -> Inputs:
    """From the manifests of the mixture, the language model and the towers; ``skip_samples`` names records
    as the mixture's section does.
    """
    contents = {path: read_json(path) for path in models}
    folders = {path: path.parent / content["folder"] for path, content in contents.items()}
    llms = [path for path, content in contents.items() if content["role"] == "llm"]
    if len(llms) != 1:
        raise UserError(f"--models: found {len(llms)} manifests of role llm; give one")
    towers = {content["name"]: folders[path] for path, content in contents.items() if path != llms[0]}
    digests = {"mixture": read_json(mixture)["digest"], "llm": contents[llms[0]]["digest"]}
    skipped = _left_out(mixture.parent, skip_samples) if skip_samples else []
    return Inputs(mixture.parent, folders[llms[0]], towers, digests, skipped)


def _left_out(mixture: Path, names: str) -> list[int]:
    try:
        return find_records(open_samples(mixture), names)
    except TrainingError as error:
        raise UserError(f"mixtures.{mixture.name}.skip_samples: {error}") from None


def layouts_of(spec: Mapping[str, Any], inputs: Inputs, tokenizer: Any) -> list[Layout]:
    """The distinct layouts of all uses."""
    found: dict[str, Layout] = {}
    for use in spec["uses"]:
        layout = use["layout"]
        flags = Interventions.from_mapping(layout["flags"])
        keeps_all = layout["vision_feature_select"] == "cls_patch"
        config = image_config(inputs.towers[layout["vision_tower"]], flags, keeps_all)
        collator = Collator.for_model(config, tokenizer, model_max_length=spec["model_max_length"])
        content = {name: spec[name] for name in ("code_version", "prompt_version", "model_max_length")}
        content["row"] = list(MEASURED.names or ())
        content |= {"skipped": list(inputs.skipped)} if inputs.skipped else {}
        text = [token if token != collator.image_token_id else "image" for token in collator.block]
        key = digest({**content, **inputs.digests, "image": text}, 16)
        known = found.setdefault(key, Layout(key, collator, config.tokens_per_image, []))
        if layout not in known.of:
            known.of.append(layout)
    return list(found.values())


# ---------------------------------------------------------------- measuring

_surveyor: Surveyor | None = None  # what forked processes inherit


def _measure(chunk: range) -> Measured:
    assert _surveyor is not None
    return _surveyor.measure(chunk)


def _end_with(parent: int) -> None:
    """A process whose parent was killed ends too, instead of waiting for work for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def measured_chunks(surveyor: Surveyor, processes: int) -> Iterator[tuple[range, Measured]]:
    """All samples in their order; in this process alone where there are few."""
    global _surveyor
    total = len(surveyor.store)
    chunks = [range(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK)]
    if processes <= 1 or len(chunks) < 3:
        yield from ((chunk, surveyor.measure(chunk)) for chunk in chunks)
        return
    _surveyor = surveyor
    context = multiprocessing.get_context("fork")  # the tokenizer and the tables are shared
    workers = min(processes, len(chunks))
    try:
        with ProcessPoolExecutor(workers, context, _end_with, (os.getpid(),)) as pool:
            yield from zip(chunks, pool.map(_measure, chunks), strict=True)
    except BrokenProcessPool:
        raise Hiccup(
            "a process of the survey was killed, perhaps for its memory; start it again with fewer"
            " --processes, or ask for more memory (set-resources: survey: mem_mb)"
        ) from None
    finally:
        _surveyor = None


def measure_all(surveyor: Surveyor, processes: int, name: str) -> Measured:
    """Every sample, for every layout of the surveyor."""
    total = len(surveyor.store)
    found = Measured(np.zeros((len(surveyor.collators), total), MEASURED))

    def records() -> Iterator[int]:
        for chunk, part in measured_chunks(surveyor, processes):
            found.rows[:, chunk.start : chunk.stop] = part.rows
            found.refused.update(part.refused)
            yield from chunk

    for _ in progress(records(), total, f"surveying {name}"):
        pass
    return found


# ---------------------------------------------------------------- what lies beside the manifest


def known_facts(folder: Path, key: str) -> dict[str, Any] | None:
    """What an earlier survey of the same content has left, if it is whole."""
    path, table = folder / f"{key}.json", folder / f"{key}.npy"
    if not (path.is_file() and table.is_file()):
        return None
    facts: dict[str, Any] = read_json(path)
    return facts if facts["sha256"] == sha256(table) else None


def write_layout(folder: Path, key: str, rows: Any, facts: Mapping[str, Any]) -> None:
    """The table, looked at again, and then what was counted in it."""
    table = folder / f"{key}.npy"
    with atomic_path(table) as temporary:
        with temporary.open("wb") as stream:
            np.save(stream, rows)
        if not np.array_equal(np.load(temporary, mmap_mode="r"), rows):
            raise Hiccup(f"{table}: what was written can't be read back; check the disk")
        content = sha256(temporary)
    write_json(folder / f"{key}.json", {**facts, "file": table.name, "sha256": content})


def survey(name: str, spec: Mapping[str, Any], inputs: Inputs, manifest: Path, processes: int = 1) -> None:
    """Makes a survey; see the module's text. Raises UserError for data that are out of bounds."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes share the work
    tokenizer = load_tokenizer(inputs.llm, spec["model_max_length"])
    layouts = layouts_of(spec, inputs, tokenizer)
    missing = [layout for layout in layouts if known_facts(manifest.parent, layout.key) is None]
    if missing:
        _survey_layouts(name, spec, inputs, tokenizer, missing, manifest.parent, processes)
    found = {layout.key: read_json(manifest.parent / f"{layout.key}.json") for layout in layouts}
    check_bounds(name, spec, layouts, found)
    described = [
        {"of": layout.of, "tokens_per_image": layout.tokens_per_image, **found[layout.key]}
        for layout in layouts
    ]
    content = {
        "survey": name,
        "mixture": spec["mixture"],
        "prompt_version": spec["prompt_version"],
        "model_max_length": spec["model_max_length"],
        "inputs": dict(inputs.digests),
        "layouts": described,
    }
    write_json(manifest, {**content, "digest": digest(content)})


def _survey_layouts(
    name: str,
    spec: Mapping[str, Any],
    inputs: Inputs,
    tokenizer: Any,
    layouts: Sequence[Layout],
    folder: Path,
    processes: int,
) -> None:
    store = open_samples(inputs.mixture)
    collators = [layout.collator for layout in layouts]
    version, length = spec["prompt_version"], spec["model_max_length"]
    surveyor = Surveyor(store, tokenizer, version, length, collators, inputs.skipped)
    measured = measure_all(surveyor, processes, name)

    def describe(index: int) -> dict[str, Any]:
        record = store.record(index)
        said = measured.refused.get(index, "").rpartition(": can't be encoded: ")[2]
        about = {"file": str(store.path), "record": index + 1, "id": record.get("id")}
        return about | {"source": store.source(index), "image": record.get("image"), "said": said}

    for layout, rows in zip(layouts, measured.rows, strict=True):
        facts = facts_of(rows, store.source_numbers, store.sources, spec["model_max_length"], describe)
        write_layout(folder, layout.key, rows, facts)


def check_bounds(
    name: str, spec: Mapping[str, Any], layouts: Sequence[Layout], found: Mapping[str, Any]
) -> None:
    """Raises UserError with everything that is out of some use's bounds."""
    said: dict[str, None] = {}
    for use in spec["uses"]:
        layout = next(item for item in layouts if use["layout"] in item.of)
        about = {"stage": use["stage"], "bounds": use["bounds"], "model_max_length": spec["model_max_length"]}
        for problem in problems(found[layout.key], about, spec["mixture"]):
            text = f"stage {use['stage']}, {layout.tokens_per_image} tokens per image: {problem}"
            said[text] = None
    if said:
        raise UserError(
            f"survey {name}: mixture {spec['mixture']} is not fit to train on:\n  " + "\n  ".join(said)
        )


def describe(manifest: Mapping[str, Any]) -> str:
    """The result for people."""
    lines = []
    for layout in manifest["layouts"]:
        found = layout["all"]
        none = ", ".join(f"{number} {name}" for name, number in found["unlabelled"].items()) or "none"
        lines.append(
            f"{manifest['survey']}, {layout['tokens_per_image']} tokens per image: {found['samples']}"
            f" samples, {found['tokens']} tokens, {found['labels']} labels; {found['cut']} cut,"
            f" {found['picture_cut']} in a picture; without a label: {none}"
        )
    return "\n".join(lines)


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Makes one survey."""
    texts = {"name": "the survey's name", "spec": "what is surveyed, as JSON (`Plan.survey_spec` gives it)"}
    paths = {"mixture": "the mixture's manifest", "manifest": "the survey's manifest, to be written"}
    parser = command_line("survey", __doc__, texts, paths)
    parser.add_argument(
        "--models", required=True, nargs="+", type=Path, help="manifests of the LLM and the vision towers"
    )
    parser.add_argument("--skip_samples", default="", help="records that trainings leave out")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the work")
    options = parser.parse_args(argv)
    inputs = read_inputs(options.mixture, options.models, options.skip_samples)
    survey(options.name, json.loads(options.spec), inputs, options.manifest, options.processes)
    print(describe(read_json(options.manifest)), flush=True)


if __name__ == "__main__":
    main()
