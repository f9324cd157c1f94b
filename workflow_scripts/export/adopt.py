"""Gives a checkpoint that was not trained here the form of an export, so that it is asked like any other.

A stock LLaVA checkpoint of transformers is linked as it is. All others (LLaVA's original layout, checkpoints
with interventions) are read by our own code and written anew: no code that lies in them is run.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_ext.files import sha256
from workflow_scripts.config.experiments import changed_fields
from workflow_scripts.export.loading import hf_loads_with
from workflow_scripts.io import UserError, digest, progress, read_json, write_json
from workflow_scripts.prepare_model.step import link

ORIGIN = ("repo", "revision", "path")


def adopt(models: Sequence[Path], manifest: Path) -> dict[str, Any]:
    """Makes the HF folder and, last, the manifest. ``models``: the manifests of the checkpoint and, for the
    original layout, of its vision tower.

    Raises:
        UserError: it can't be read, or can't be asked (it has no chat template).
    """
    described = [read_json(path) for path in models]
    source, *towers = (path.parent / item["folder"] for path, item in zip(models, described, strict=True))
    home = manifest.parent / digest([item["digest"] for item in described], 10)
    home.mkdir(parents=True, exist_ok=True)
    hf = home / "hf"
    shutil.rmtree(hf, ignore_errors=True)
    if read_json(source / "config.json").get("model_type") == "llava" and not towers:
        files = _linked(source, described[0]["files"], hf)
    else:
        files = _converted(source, hf, towers[0] if towers else None)
    check_prompt(hf, described[0]["name"])
    result = {
        "run": manifest.parent.name,
        "folder": home.name,
        "folders": {"hf": f"{home.name}/hf"},
        "digest": digest(files),
        "files": {"hf": files},
        "interventions": _interventions(hf),
        "loads_with": {"hf": hf_loads_with(hf)},
        "origin": {key: described[0][key] for key in ORIGIN if key in described[0]},
    }
    write_json(manifest, result)
    return result


def _linked(source: Path, files: dict[str, Any], target: Path) -> dict[str, str]:
    """The prepared model's files under the same names, verified; code is left behind."""
    staging = target.with_name(f".{target.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    found = {name: item["sha256"] for name, item in files.items() if not name.endswith(".py")}
    for name in progress(found, len(found), "verifying the checkpoint"):
        link(source / name, staging / name)
        if sha256(staging / name) != found[name]:
            raise UserError(
                f"{source / name}: has changed since it was prepared; delete"
                f" {source.parent / 'manifest.json'} to prepare it again"
            )
    staging.rename(target)
    return found


def _converted(source: Path, target: Path, tower: Path | None) -> dict[str, str]:
    """The checkpoint as our own code reads and writes it: the files' sha256 by name."""
    from llava_ext.convert import convert
    from llava_ext.errors import TrainingError

    try:
        convert(source, target, "hf", tower=str(tower) if tower else None)
    except (TrainingError, ValueError, OSError) as error:
        raise UserError(f"{source}: can't be read as a LLaVA checkpoint: {error}") from error
    return {path.name: sha256(path) for path in sorted(target.iterdir()) if path.is_file()}


def _interventions(folder: Path) -> dict[str, Any]:
    """The flags that a checkpoint has been trained with; none for stock LLaVA."""
    if read_json(folder / "config.json")["model_type"] == "llava":
        return {}
    from llava_ext.model.configuration_spatial_llava import SpatialLlavaConfig

    return changed_fields(SpatialLlavaConfig.from_pretrained(str(folder)).interventions)


def check_prompt(folder: Path, name: str) -> None:
    """Raises UserError unless the checkpoint says how it wants to be asked, as its processor understands it.

    Questions are asked in its own chat template; without one any prompt would be a guess, and the answers of
    another model.
    """
    from transformers import AutoProcessor

    stock = read_json(folder / "config.json")["model_type"] == "llava"
    options = {} if stock else {"trust_remote_code": True}
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    try:
        processor: Any = AutoProcessor.from_pretrained(str(folder), backend="pil", **options)
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True
        )
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"models.{name}: its processor can't be used ({error}); a checkpoint needs processor_config.json"
            " (or preprocessor_config.json), its tokenizer and a chat template"
        ) from error
    if prompt.count(processor.image_token) != 1 or "What is it?" not in prompt:
        raise UserError(
            f"models.{name}: its chat template makes {prompt!r:.200} of a picture and a question: one"
            f" {processor.image_token!r} and the question's text are needed; mend its chat template"
        )
