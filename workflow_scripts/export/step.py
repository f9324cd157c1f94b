"""Exports a finished training for others: a clean HF folder and the original LLaVA layout.

    python -m workflow_scripts.export --spec JSON --trained runs/finetune/R/manifest.json --manifest
    runs/export/R/manifest.json

The HF folder holds hard links to the training's final files, so it costs no space and outlives the trainer's
state. With `--models` it is a checkpoint that was not trained here that gets the same form, so that it is
asked like any other: see workflow_scripts/export/adopt.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_ext.files import sha256
from llava_ext.model.interventions import Interventions
from workflow_scripts.command_line import command_line
from workflow_scripts.export.adopt import adopt
from workflow_scripts.export.loading import hf_loads_with
from workflow_scripts.io import UserError, digest, progress, read_json, user_errors, write_json
from workflow_scripts.prepare_model.step import link

# Written by the trainer beside the checkpoint, of no use to whoever loads it.
NOT_EXPORTED = {"trainer_state.json", "training_args.bin"}


def export_hf(trained: Path, target: Path) -> dict[str, str]:
    """Links the final files into ``target`` and verifies each: the file's sha256 by its name."""
    content = read_json(trained)
    state = trained.parent / content["folder"]
    staging = target.with_name(f".{target.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    names = [
        name for name in content["files"] if name not in NOT_EXPORTED and not name.startswith("adapters/")
    ]
    for name in progress(names, len(names), "verifying the checkpoint"):
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        link(state / name, staging / name)
        if sha256(staging / name) != content["files"][name]:
            raise UserError(
                f"{state / name}: has changed since the training finished; put the file back, or delete"
                f" {trained} and {state} to train again"
            )
    shutil.copyfile(state / "provenance.json", staging / "provenance.json")
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    return {name: content["files"][name] for name in names}


def export_llava(hf: Path, target: Path, vision_tower: str) -> dict[str, str]:
    """The original LLaVA layout, made from the HF folder: the files' sha256 by name."""
    from llava_ext.convert import convert

    shutil.rmtree(target, ignore_errors=True)
    convert(hf, target, "llava", vision_tower=vision_tower)
    return {path.name: sha256(path) for path in sorted(target.iterdir()) if path.is_file()}


def export(spec: Mapping[str, Any], trained: Path, manifest: Path) -> dict[str, Any]:
    """Both exports (LLaVA's own only of families that LLaVA's code knows) and, last, the manifest."""
    from llava_ext.checkpoints.original import loads_with, unknown_to_llava

    content = read_json(trained)
    home = manifest.parent / content["digest"][:10]
    home.mkdir(parents=True, exist_ok=True)
    files = {"hf": export_hf(trained, home / "hf")}
    described = read_json(home / "hf" / "config.json")
    families = described["text_config"]["model_type"], described["vision_config"]["model_type"]
    readers = {"hf": hf_loads_with(home / "hf")}
    unknown = unknown_to_llava(*families)
    if unknown:
        print(f"no export in the original LLaVA layout: {'; '.join(unknown)}", flush=True)
    else:
        files["llava"] = export_llava(home / "hf", home / "llava", spec["vision_tower"])
        readers["llava"] = loads_with(Interventions.from_mapping(spec["interventions"]), *families)
    result = {
        "run": manifest.parent.name,
        content["stage"]: content["run"],
        "folder": home.name,
        "folders": {name: f"{home.name}/{name}" for name in files},
        "digest": digest(files["hf"]),
        "files": files,
        "interventions": spec["interventions"],
        "loads_with": readers,
    }
    write_json(manifest, result)
    return result


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Exports one training."""
    texts = {"spec": "what `Plan.export_spec` gives, as JSON"}
    parser = command_line("export", __doc__, texts, {"manifest": "the export's manifest, to be written"})
    made_from = parser.add_mutually_exclusive_group(required=True)
    made_from.add_argument("--trained", type=Path, help="the manifest of the last stage's run")
    made_from.add_argument(
        "--models", type=Path, nargs="+", help="the manifests of a checkpoint and, if needed, of its tower"
    )
    options = parser.parse_args(argv)
    if options.models:
        result = adopt(options.models, options.manifest)
    else:
        result = export(json.loads(options.spec), options.trained, options.manifest)
    print(f"exported to {options.manifest.parent / result['folder']}", flush=True)


if __name__ == "__main__":
    main()
