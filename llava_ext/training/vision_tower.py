"""The vision tower as a part that trains: which of its weights can."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..checkpoints.keys import TRAINED_TOWER
from ..errors import say
from ..model.modeling_spatial_llava import SpatialLlavaModel
from ..patches import without_zero3
from .lora import is_adapted


def train_tower(model: Any) -> None:
    """Lets the tower train, adapters or not, and says which of its weights stay as they are.

    What no gradient can reach (with LLaVA's layer -2 the last layer and the closing norm) is frozen: DDP,
    FSDP and ZeRO wait for the gradient of every weight that trains. The tower's config then says for good, in
    LLaVA's word, that its weights are no longer those of the folder it came from.
    """
    whole = model.get_base_model() if is_adapted(model) else model
    tower, config = whole.model.vision_tower, whole.config
    idle = unreached(config)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(name not in idle)
    setattr(config.vision_config, TRAINED_TOWER, True)
    kept = f", except {', '.join(_summary(tower, idle))}, which the vision tokens do not use" if idle else ""
    say(f"the vision tower trains{kept}")


def unreached(config: Any) -> set[str]:
    """Names, within the tower, of the parameters on which the vision tokens do not depend.

    A model without memory for its weights computes one image and its gradients; whatever gets none is named.

    Args:
        config: of the whole model (``SpatialLlavaConfig``).
    """
    plain = copy.deepcopy(config)
    plain._attn_implementation = "eager"  # the one that needs no device
    with torch.device("meta"), without_zero3(), torch.enable_grad():
        model = SpatialLlavaModel(plain)
        image = torch.zeros(1, 3, plain.image_side, plain.image_side)
        tokens = model.get_image_features(image).pooler_output[0]
        tokens.sum().backward()
    return {name for name, parameter in model.vision_tower.named_parameters() if parameter.grad is None}


def _summary(tower: nn.Module, names: set[str]) -> list[str]:
    """The same parameters as the largest modules that hold nothing else, and single names where there is
    none.
    """
    found: list[str] = []
    for path, module in tower.named_modules():
        inside = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if inside and inside <= names and not any(path.startswith(f"{other}.") for other in found):
            found.append(path)
    loose = [name for name in names if not any(name.startswith(f"{path}.") for path in found)]
    return found + sorted(loose)
