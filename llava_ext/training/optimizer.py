"""What trains and how: stage freezing and the optimizer's parameter groups, as LLaVA's training code makes
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..distributed.gather import whole_shape

if TYPE_CHECKING:
    from torch import nn

PROJECTOR = "multi_modal_projector"
TOWER = "vision_tower"
LANGUAGE_MODEL = "language_model"


def component(name: str) -> str:
    """The part of the model that a parameter belongs to: its first known module name, else ``lm_head``."""
    for part in name.split("."):
        if part in (PROJECTOR, TOWER, LANGUAGE_MODEL):
            return part
    return "lm_head"


def freeze(
    model: nn.Module, *, tune_mm_mlp_adapter: bool, freeze_mm_mlp_adapter: bool, freeze_backbone: bool
) -> None:
    """Sets ``requires_grad`` as LLaVA's stages do; the vision tower is frozen (see ``vision_tower.py``).

    * ``tune_mm_mlp_adapter`` (stage 1): only the projector trains.
    * ``freeze_backbone``: the LLM's embeddings, layers and final norm are frozen. ``lm_head`` goes on
      training, as in LLaVA, which freezes ``model.model`` only.
    * ``freeze_mm_mlp_adapter``: the projector is frozen, whatever the others say.
    """
    for name, parameter in model.named_parameters():
        part = component(name)
        if part == TOWER:
            trains = False
        elif part == PROJECTOR:
            trains = not freeze_mm_mlp_adapter
        elif part == LANGUAGE_MODEL:
            trains = not (freeze_backbone or tune_mm_mlp_adapter)
        else:
            trains = not tune_mm_mlp_adapter
        parameter.requires_grad_(trains)


def undecayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters without weight decay: biases, LayerNorms, and the LLM's norm weights.

    The normalised projector's own norm weight does decay, as in the published code.
    """
    from torch import nn

    names = set()
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}" if path else own
            norm = len(whole_shape(parameter)) == 1 and component(name) == LANGUAGE_MODEL
            if own == "bias" or isinstance(module, nn.LayerNorm) or norm:
                names.add(name)
    return names


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    mm_projector_lr: float | None = None,
    vision_tower_lr: float | None = None,
) -> list[dict[str, Any]]:
    """The optimizer's groups: decayed and undecayed, and both again for each part that has its own rate.

    The order is LLaVA's: others decayed, others undecayed, then the same of the projector, then of the tower.
    Each group carries ``names``, so that a saved optimizer can be read by name.
    """
    undecayed = undecayed_names(model)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    rates = {PROJECTOR: mm_projector_lr, TOWER: vision_tower_lr}
    own = {part: float(rate) for part, rate in rates.items() if rate}

    def group(part: str | None, decayed: bool, **settings: float) -> dict[str, Any]:
        members = [
            (name, parameter)
            for name, parameter in trained
            if (name not in undecayed) == decayed
            and part == (component(name) if component(name) in own else None)
        ]
        return {
            "params": [parameter for _, parameter in members],
            "names": [name for name, _ in members],
            "weight_decay": weight_decay if decayed else 0.0,
            **settings,
        }

    groups = [group(None, True), group(None, False)]
    for part, rate in own.items():
        groups += [group(part, True, lr=rate), group(part, False, lr=rate)]
    return groups


def trainable_names(model: nn.Module) -> list[str]:
    """Names of the parameters that train, in the model's order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
