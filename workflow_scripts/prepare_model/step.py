"""Prepares one model: a copy of the folder with its weights linked, its JSON copied, its generation config
mended.

    python -m workflow_scripts.prepare_model --name N --spec '<JSON of the model>' --manifest
    models/N/manifest.json

The original (a hub cache, your own folder) is never changed. PyTorch `.bin` weights are read without running
code in them (`weights_only`) and written again as safetensors. A preflight proves that what training will
save can be saved.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_ext.checkpoints.generation import REPAIRED, SAMPLING
from llava_ext.files import follow_umask, sha256
from workflow_scripts.acquire.stopping import until_signalled
from workflow_scripts.command_line import command_line, read_spec
from workflow_scripts.config.checkpoints import layout_problem
from workflow_scripts.config.models import HubModel, ModelSpec, PathModel
from workflow_scripts.io import UserError, digest, progress, read_json, user_errors, write_json

COPIED = (".json", ".txt", ".model", ".jinja", ".md", ".py")
LINKED = (".safetensors",)
HASHES = ".hashes.json"
INDEX = "pytorch_model.bin.index.json"


def prepare(name: str, spec: Any, manifest: Path) -> dict[str, Any]:
    """Makes ``models/<name>/model`` and, last, its manifest, which it returns."""
    folder = manifest.parent / "model"
    temporary = manifest.parent / ".model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    origin = _fill(spec, manifest.parent, temporary)
    patched = patch_generation_config(temporary) if getattr(spec, "patch_do_sample", True) else []
    preflight(temporary, spec.role, name, getattr(spec, "layout", "hf"))
    _replace(temporary, folder)
    files = _hashes(folder, manifest.parent / HASHES)
    content = {
        "name": name,
        "kind": spec.kind,
        "role": spec.role,
        "folder": "model",
        "digest": digest({path: row["sha256"] for path, row in files.items()}),
        "files": {path: {"bytes": row["bytes"], "sha256": row["sha256"]} for path, row in files.items()},
        "patched": patched,
        **origin,
    }
    write_json(manifest, content)
    return content


def _fill(spec: Any, home: Path, target: Path) -> dict[str, Any]:
    """Puts the model's files into ``target`` and returns where they come from."""
    if isinstance(spec, HubModel):
        from workflow_scripts.acquire.hub import fetch_snapshot

        commit, found = until_signalled(
            lambda: fetch_snapshot(
                spec.repo,
                spec.revision,
                home / "download",
                choose=lambda names: choose_files(names, _ignored(spec)),
            )
        )
        copy_model(((path, facts["path"]) for path, facts in found), target)
        return {"repo": spec.repo, "revision": commit}
    if isinstance(spec, PathModel):
        origin = Path(spec.path).expanduser()
        names = [str(path.relative_to(origin)) for path in sorted(origin.rglob("*")) if path.is_file()]
        if "config.json" not in names:
            raise UserError(
                f"{origin}: no config.json in it; `path` must be a model folder as transformers saves it"
            )
        copy_model(((origin / name, name) for name in choose_files(names, _ignored(spec))), target)
        return {"path": str(origin.absolute())}
    from workflow_scripts.demo.models import build

    build(spec, target)
    return {}


def _ignored(spec: HubModel | PathModel) -> tuple[str, ...]:
    """Files that are not taken. The original layout has the projector twice: in the weights, which are whole,
    and in a file of its own.
    """
    twice = ("mm_projector.bin",) if spec.role == "checkpoint" else ()
    return (*getattr(spec, "ignore", ()), *twice)


def choose_files(names: Sequence[str], ignore: Iterable[str]) -> list[str]:
    """The files that are needed: safetensors rather than `.bin` where there are both, nothing hidden or
    ignored.
    """
    kept = [
        name
        for name in names
        if not any(part.startswith(".") for part in name.split("/"))
        and not any(
            fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(Path(name).name, pattern) for pattern in ignore
        )
        and "/" not in name
        and name.endswith((*COPIED, *LINKED, ".bin"))
    ]
    if any(name.endswith(".safetensors") for name in kept):
        kept = [name for name in kept if not name.endswith((".bin", ".bin.index.json"))]
    return [name for name in kept if name not in ("training_args.bin", "optimizer.bin", "scheduler.bin")]


def copy_model(files: Iterable[tuple[Path, str]], target: Path) -> None:
    """Links weights, copies small files, converts `.bin` weights."""
    shards: dict[str, Path] = {}
    for path, name in files:
        if name.endswith(".bin"):
            shards[name] = path
        elif name.endswith(LINKED):
            link(path, target / name)
        elif name != INDEX:
            shutil.copyfile(path, target / name)
    if shards:
        convert_shards(shards, target)


def link(origin: Path, target: Path) -> None:
    """A hard link where the file system allows it, so that a cleaned cache takes nothing away; else a
    symbolic one.
    """
    real = origin.resolve()
    try:
        os.link(real, target)
    except OSError:
        target.symlink_to(real)


def convert_shards(shards: dict[str, Path], target: Path) -> None:
    """Writes PyTorch shards as safetensors with an index. Nothing inside the files is executed."""
    import torch
    from safetensors.torch import save_file

    weights: dict[str, str] = {}
    total = 0
    for number, name in enumerate(
        progress(sorted(shards), len(shards), "converting shards to safetensors"), start=1
    ):
        try:
            state = torch.load(shards[name], map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # noqa: BLE001 - unpickling can fail in any way
            raise UserError(
                f"{shards[name]}: can't be read as plain weights ({type(error).__name__}: {error})"
            ) from None
        if not isinstance(state, dict) or not all(isinstance(item, torch.Tensor) for item in state.values()):
            raise UserError(
                f"{shards[name]}: holds something else than named tensors; is it a model's weights?"
            )
        shard = (
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        )
        save_file(_without_shared_memory(state), target / shard, metadata={"format": "pt"})
        weights |= dict.fromkeys(state, shard)
        total += sum(item.numel() * item.element_size() for item in state.values())
    follow_umask(target, "*.safetensors")
    if len(shards) > 1:
        write_json(
            target / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weights},
        )


def _without_shared_memory(state: Mapping[str, Any]) -> dict[str, Any]:
    """Contiguous tensors that share no memory (as tied weights do), which safetensors refuses.

    All others stay in the mapped file: a shard of 10 GB needs no 10 GB of memory.
    """
    seen: set[int] = set()
    found = {}
    for key, item in state.items():
        place = item.untyped_storage().data_ptr()
        shared = place in seen or item.untyped_storage().nbytes() != item.numel() * item.element_size()
        seen.add(place)
        found[key] = item.clone().contiguous() if shared else item.contiguous()
    return found


def patch_generation_config(folder: Path) -> list[str]:
    """Sets `do_sample` where sampling values stand without it, which is what makes saving fail after stage 2.

    The file says that it is a repair, so that a finished checkpoint still generates greedily.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    config = read_json(path)
    if config.get("do_sample") or not any(
        key in config and config[key] not in (None, 1.0, 50) for key in SAMPLING
    ):
        return []
    write_json(path, {**config, "do_sample": True, REPAIRED: True})
    return ["generation_config.json: do_sample = true"]


# ---------------------------------------------------------------- the proof that saving will work


def preflight(folder: Path, role: str, name: str, layout: str = "hf") -> None:
    """Loads the configs and, for an LLM, the tokenizer, and saves them once; of a checkpoint it looks at the
    layout, as no code of its own is run. Raises UserError that says what fails.
    """
    if role == "checkpoint":
        _preflight_checkpoint(folder, layout, name)
    else:
        _preflight_part(folder, role, name)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"models.{name}: no weights (*.safetensors or *.bin) in the folder")
    _check_shards(folder, name)


def _preflight_checkpoint(folder: Path, layout: str, name: str) -> None:
    described = read_json(folder / "config.json")
    if problem := layout_problem(described, layout):
        allowed, fix = problem
        raise UserError(
            f"models.{name}: its config.json has model_type {described.get('model_type')!r}; allowed with"
            f" layout: {layout}: {allowed}; {fix}"
        )
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"models.{name}: adapters (LoRA) of another model, no whole checkpoint; merge them first with"
            " `python -m llava_ext.convert FOLDER TARGET --to hf --llm ... --tower ...` and name the result"
        )


def _preflight_part(folder: Path, role: str, name: str) -> None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
        with tempfile.TemporaryDirectory(dir=folder.parent) as trial:
            config.save_pretrained(trial)
            if role == "llm":
                _preflight_llm(folder, Path(trial))
            else:
                _preflight_tower(folder)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise UserError(f"models.{name}: this model could not be used or saved: {error}") from None


def _preflight_llm(folder: Path, trial: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    from llava_ext.model.folders import load_tokenizer
    from llava_ext.model.parts import check_language_model

    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
        generation.validate(strict=True)
        generation.save_pretrained(trial)
    check_language_model(folder)
    load_tokenizer(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    text = "A picture of 7 cats."
    ids = tokenizer(text)["input_ids"]
    if text.split()[-1].strip(".") not in tokenizer.decode(ids):
        raise ValueError(f"the tokenizer does not give {text!r} back but {tokenizer.decode(ids)!r}")
    tokenizer.save_pretrained(trial)
    again: Any = AutoTokenizer.from_pretrained(trial)
    if again(text)["input_ids"] != ids:
        raise ValueError("the tokenizer gives other ids after saving and loading it")


def _preflight_tower(folder: Path) -> None:
    """The tower is registered, and takes the pictures that its image processor gives."""
    from llava_ext.model.folders import load_image_processor, picture_fields, tower_config

    picture_fields(tower_config(folder), load_image_processor(folder))


def _check_shards(folder: Path, name: str) -> None:
    """Every file that the index names is there, and every weight file has a readable header."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    wanted = set(read_json(index)["weight_map"].values()) if index.is_file() else set()
    missing = sorted(shard for shard in wanted if not (folder / shard).exists())
    if missing:
        raise UserError(
            f"models.{name}: the index names {', '.join(missing)}, which are missing; fetch the model again"
        )
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                file.keys()
        except Exception as error:  # noqa: BLE001 - safetensors has its own error class
            raise UserError(
                f"models.{name}: {path.name} is damaged ({error}); fetch the model again"
            ) from None


# ---------------------------------------------------------------- helpers


def _replace(new: Path, folder: Path) -> None:
    """Puts the finished folder in the place of the old one."""
    old = folder.with_name(".model.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _hashes(folder: Path, memory: Path) -> dict[str, dict[str, Any]]:
    """The sha256 of each file; a file with the same size, time and inode as last time is not read again."""
    known = json.loads(memory.read_text()) if memory.is_file() else {}
    found = {}
    for path in progress(sorted(folder.iterdir()), None, f"hashing {folder}"):
        facts = path.stat()
        key = [facts.st_size, facts.st_mtime_ns, facts.st_ino]
        row = known.get(path.name, {})
        sha = row["sha256"] if row.get("key") == key else sha256(path)
        found[path.name] = {"bytes": facts.st_size, "sha256": sha, "key": key}
    write_json(memory, found)
    return found


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Prepares one model."""
    texts = {"name": "the model's name", "spec": "the model's section of the config, as JSON"}
    paths = {"manifest": "the model's manifest, to be written"}
    options = command_line("prepare_model", __doc__, texts, paths).parse_args(argv)
    content = prepare(options.name, read_spec(ModelSpec, options.spec), options.manifest)
    patched = content["patched"] or "nothing"
    print(f"{options.name}: {content['role']} ready; patched: {patched}", file=sys.stderr)


if __name__ == "__main__":
    main()
