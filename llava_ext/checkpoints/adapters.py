"""Low-rank adapters of a language model: their names here and by themselves, and folders as LLaVA's LoRA
leaves them.

Such a folder has the adapters in peft's layout, by the names of the language model alone; what else trained
in ``non_lora_trainables.bin``; and an original ``config.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from .tensors import NON_LORA, read_tensors

WRAPPED = "base_model.model."  # what peft puts before every name
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# The language model's place in ours, and where it is the whole model.
INSIDE, ALONE = f"{WRAPPED}model.language_model.", f"{WRAPPED}model."


def name_alone(name: str) -> str:
    """An adapter's name in our model as it is called on the language model alone."""
    return ALONE + name.removeprefix(INSIDE) if name.startswith(INSIDE) else name


def name_inside(name: str) -> str:
    """The reverse of :func:`name_alone`; names of our model stay."""
    return name if name.startswith(INSIDE) else INSIDE + name.removeprefix(ALONE)


def adapted_modules(names: Iterable[str]) -> list[str]:
    """The linear layers whose adapters have these names."""
    pieces = (name.removeprefix(WRAPPED).partition(".lora_A.") for name in names)
    return sorted({module for module, separator, _ in pieces if separator})


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds adapters rather than a model."""
    return (folder / CONFIG).is_file()


def read_adapters(folder: Path) -> dict[str, Any]:
    """The adapters' tensors under the names in their file. Raises :class:`TrainingError`: none there, or
    damaged.
    """
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None or not is_adapter_folder(folder):
        raise TrainingError(f"{folder}: no adapters; expected {CONFIG} and one of {', '.join(WEIGHTS)}")
    return read_tensors(found)


def merge_adapters(language: Any, folder: Path) -> Any:
    """The language model with a folder's adapters added to its weights.

    Raises:
        TrainingError: the adapters are of another model, or more than the projector trained beside them.
    """
    state = {name_alone(name): tensor for name, tensor in read_adapters(folder).items()}
    more = folder / NON_LORA
    others = [name for name in (read_tensors(more) if more.is_file() else ()) if "mm_projector." not in name]
    if others:
        raise TrainingError(f"{more}: allowed is a projector; found {', '.join(sorted(others)[:3])} too")
    return attach(language, folder, state).merge_and_unload()


def attach(model: Any, folder: Path, state: Mapping[str, Any], in_float32: bool = True) -> Any:
    """The model with a folder's adapters, ready to train, whose tensors have come by names of this model.

    Raises:
        TrainingError: adapters without a layer, layers without adapters (of both peft says nothing), another
            shape.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(folder))
    config.target_modules = adapted_modules(state)
    config.inference_mode, config.base_model_name_or_path = False, None
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=in_float32)
        outcome = set_peft_model_state_dict(adapted, dict(state))
    except (ValueError, RuntimeError) as error:
        raise TrainingError(f"{folder}: its adapters do not fit this model: {error}") from error
    wrong = [*outcome.unexpected_keys, *(name for name in outcome.missing_keys if ".lora_" in name)]
    if wrong:
        raise TrainingError(f"{folder}: its adapters do not fit this model: {', '.join(sorted(wrong)[:3])}")
    return adapted
