"""Low-rank adapters of the LLM for stage 2, with peft; merged into plain weights on export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

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
) -> Any:
    """The model with adapters. Everything is frozen but these and, unless told otherwise, the projector.

    Args:
        weights: an adapter folder to start from; empty starts new ones.
        in_float32: keep adapters in float32 beside a half-precision model. Not for DeepSpeed, which keeps float32 copies itself
            and whose ZeRO-3 takes one precision only.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if weights:
        wrapped = PeftModel.from_pretrained(
            model, weights, is_trainable=True, autocast_adapter_dtype=in_float32
        )
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


def save_adapters(model: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    """The adapters alone, in peft's layout. ``state``: gathered tensors under the adapted model's names."""
    model.save_pretrained(str(folder), state_dict=state)
