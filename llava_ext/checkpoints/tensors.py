"""Files of tensors: read without running code, sharded, compared with what a model expects."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..errors import TrainingError
from ..files import write_json
from .keys import ORIGINAL_PROJECTOR, State, projector_from_original

# What trained beside LLaVA's low-rank adapters.
NON_LORA = "non_lora_trainables.bin"
PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin", NON_LORA)


WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def read_tensors(path: Path) -> State:
    """The tensors of one ``.safetensors`` or torch file; a pickle that holds anything else is refused.

    Raises:
        TrainingError: absent, damaged, or not only tensors.
    """
    if not path.is_file():
        raise TrainingError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise TrainingError(f"{path}: damaged, or not only tensors, so it is not loaded: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise TrainingError(f"{path}: holds something other than named tensors")
    return state


def read_folder(folder: Path) -> State:
    """All tensors of a checkpoint folder, sharded or not, under the names in its files."""
    for name in WEIGHT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix != ".json":
            return read_tensors(path)
        shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        state: State = {}
        for shard in shards:
            state |= read_tensors(folder / Path(shard).name)
        return state
    raise TrainingError(f"{folder}: no weights; expected one of {', '.join(WEIGHT_FILES)}")


def read_projector(path: Path) -> State:
    """A projector's tensors under our names (``linear_1.weight``, ``norm.weight``), from any file that has
    one.

    Args:
        path: ``mm_projector.bin``, a ``.safetensors`` file, or a folder with either (or with a whole
            checkpoint).
    """
    if path.is_dir():
        found = next((path / name for name in PROJECTOR_FILES if (path / name).is_file()), None)
        state = read_tensors(found) if found else read_folder(path)
    else:
        state = read_tensors(path)
    projector = projector_from_original(state) or {
        name.rsplit("multi_modal_projector.", 1)[1]: tensor
        for name, tensor in state.items()
        if "multi_modal_projector." in name
    }
    if not projector:
        raise TrainingError(f"{path}: no projector in it; expected keys like {ORIGINAL_PROJECTOR}0.weight")
    return projector


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Names and shapes in a safetensors file, from its header alone."""
    with safe_open(path, framework="pt") as stream:
        names = stream.keys()
        return {name: stream.get_slice(name).get_shape() for name in names}


def check_projector(
    projector: Mapping[str, torch.Tensor], expected: Mapping[str, Iterable[int]], what: str
) -> None:
    """Refuses a projector that does not fit the model, naming each key that differs.

    Args:
        projector: what was read, under our names.
        expected: name to shape, of the model.
        what: where it was read from, for the message.
    """
    wrong = [f"  {name}: missing there" for name in expected if name not in projector]
    wrong += [f"  {name}: not in this model" for name in projector if name not in expected]
    wrong += [
        f"  {name}: {list(projector[name].shape)} there, {list(shape)} here"
        for name, shape in expected.items()
        if name in projector and list(projector[name].shape) != list(shape)
    ]
    if wrong:
        raise TrainingError(
            f"{what}: is not a projector for this model (other interventions, another vision tower or another"
            " LLM):\n" + "\n".join(sorted(wrong))
        )


def save_sharded(tensors: State, folder: Path, shard_bytes: int = 5 * 10**9) -> None:
    """``model.safetensors``, or numbered shards with their index when it would be too large."""
    shards: list[State] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= size
    if len(shards) == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places}
    )
