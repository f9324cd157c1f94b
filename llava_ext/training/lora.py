"""Low-rank adapters of the LLM for stage 2, with peft; merged into plain weights on export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints import adapters
from .optimizer import LANGUAGE_MODEL, PROJECTOR, TOWER, component


def linear_modules(model: nn.Module) -> list[str]:
    """Full names of the LLM's linear layers (not ``lm_head``, tower or projector), as LLaVA chooses them."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and component(name) == LANGUAGE_MODEL
    ]


def add_adapters(
    model: Any,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    bias: str,
    weights: str = "",
    train_projector: bool = True,
    in_float32: bool = True,
    autocast: bool = False,
) -> Any:
    """The model with adapters. Everything is frozen but these and, unless told otherwise, the projector.

    Args:
        weights: an adapter folder to start from, ours or LLaVA's; empty starts new ones.
        in_float32: keep adapters in float32 beside a half-precision model. Not for DeepSpeed, which keeps
            float32 copies itself and whose ZeRO-3 takes one precision only.
        autocast: the training computes under autocast, which casts adapters to half precision. Activations
            then stay as they are: cast to float32 and back they would be the same bits.
    """
    from peft import LoraConfig, get_peft_model

    if weights:
        saved = adapters.read_adapters(Path(weights))
        state = {adapters.name_inside(name): tensor for name, tensor in saved.items()}
        wrapped = adapters.attach(model, Path(weights), state, in_float32)
    else:
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            bias=bias,
            target_modules=linear_modules(model),
            task_type="CAUSAL_LM",
        )
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=in_float32)
    for module in wrapped.modules() if autocast else ():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    for name, parameter in wrapped.named_parameters():
        if component(name) == PROJECTOR:
            parameter.requires_grad_(train_projector)
        elif component(name) == TOWER:
            parameter.requires_grad_(False)
    return wrapped


def is_adapted(model: Any) -> bool:
    """Whether the model carries adapters."""
    return hasattr(model, "peft_config")


def merged_state(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Plain weights, with each adapter added to its layer, under the names of the model without adapters.

    Args:
        model: the adapted model, for scalings and for weights that ``state`` does not hold.
        state: gathered tensors under the adapted model's names.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        plain = name.removeprefix("base_model.model.")
        if ".lora_A." in plain or ".lora_B." in plain:
            continue
        found[plain.replace(".base_layer.", ".")] = tensor
    for path, module in model.named_modules():
        if not hasattr(module, "lora_A") or not hasattr(module, "scaling"):
            continue
        for adapter, scale in module.scaling.items():
            down, up = (state[f"{path}.lora_{side}.{adapter}.weight"] for side in "AB")
            key = path.removeprefix("base_model.model.") + ".weight"
            base = found[key]
            delta = (up.float() @ down.float()) * scale
            found[key] = (base.float() + delta.to(base.device)).to(base.dtype)
    return found


def save_adapters(
    model: Any, state: dict[str, torch.Tensor], folder: Path, base: str, alone: bool = True
) -> None:
    """The adapters in peft's layout, which peft loads on the model that ``base`` names.

    Args:
        state: gathered tensors under the adapted model's names.
        base: folder or hub id, as the training was given it.
        alone: ``base`` is a language model; else it is a whole LLaVA checkpoint, whose names are ours.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    found = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    found = {name: tensor.contiguous() for name, tensor in found.items() if component(name) == LANGUAGE_MODEL}
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    modules = adapters.adapted_modules(found)
    config.target_modules = {name.rpartition(".")[2] for name in modules} if alone else set(modules)
    if alone:
        found = {adapters.name_alone(name): tensor for name, tensor in found.items()}
    save_file(found, folder / adapters.WEIGHTS[0], metadata={"format": "pt"})
    config.save_pretrained(str(folder))
