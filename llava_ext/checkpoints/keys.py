"""The names of the original LLaVA layout and those in memory, both ways, without loss."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from ..errors import TrainingError
from ..model.interventions import Interventions
from ..model.towers import TOWERS

State = dict[str, torch.Tensor]


PROJECTOR = "model.multi_modal_projector."


TOWER = "model.vision_tower."


LLM = "model.language_model."


ORIGINAL_PROJECTOR = "model.mm_projector."


# Of CLIP towers, the only ones that LLaVA's code has.
ORIGINAL_TOWER = str(TOWERS["clip_vision_model"].original_prefix)


# LLaVA's word in a config: the weights of the vision tower are the checkpoint's, no longer those of the
# folder or repository that it names. Written to the tower's own config, from which it reaches every other.
TRAINED_TOWER = "unfreeze_mm_vision_tower"


WRAPPERS = ("proj", "projector")


def projector_from_original(state: Mapping[str, torch.Tensor]) -> State:
    """The projector in ``state`` (keys with ``mm_projector.``) under our names; empty when there is none.

    Registers of the published code are left out: it cuts them off again, so they change nothing.
    """
    found: State = {}
    for key, tensor in state.items():
        _, separator, rest = key.partition("mm_projector.")
        if not separator:
            continue
        parts = rest.split(".")
        while parts[0] in WRAPPERS:
            parts = parts[1:]
        if parts[0] == "registers":
            continue
        if parts[0] == "norm":
            name = "norm.weight"
        elif parts[0].isdigit():
            name = f"linear_{int(parts[0]) // 2 + 1}.{parts[1]}"
        elif parts[0] in ("weight", "bias"):
            name = f"linear_1.{parts[0]}"
        else:
            raise TrainingError(f"projector: unknown key {key!r}")
        found[name] = tensor
    return found


def projector_to_original(projector: Mapping[str, torch.Tensor], interventions: Interventions) -> State:
    """Our names to the keys of ``mm_projector.bin``, wrapped as the published code wraps them."""
    outer = "proj." if interventions.compression_after_projection else ""
    if interventions.add_spatial_coordinates:
        outer += "projector."
    inner = outer + ("projector." if interventions.normalize_projector else "")
    linears = {name.split(".")[0] for name in projector if name.startswith("linear_")}
    found: State = {}
    for name, tensor in projector.items():
        layer, _, leaf = name.partition(".")
        if layer == "norm":
            key = f"{outer}norm.{leaf}"
        elif len(linears) == 1:
            key = f"{inner}{leaf}"
        else:
            key = f"{inner}{2 * (int(layer.removeprefix('linear_')) - 1)}.{leaf}"
        found[ORIGINAL_PROJECTOR + key] = tensor
    return found


def projector_of(state: Mapping[str, torch.Tensor]) -> State:
    """The projector in a state with names as in memory, without the prefix."""
    return {
        name.removeprefix(PROJECTOR): tensor for name, tensor in state.items() if name.startswith(PROJECTOR)
    }


def projector_type(projector: Mapping[str, torch.Tensor]) -> str:
    """LLaVA's name for the projector's shape."""
    depth = sum(1 for name in projector if re.fullmatch(r"linear_\d+\.weight", name))
    return "linear" if depth == 1 else f"mlp{depth}x_gelu"


def state_from_original(state: Mapping[str, torch.Tensor]) -> State:
    """A whole original checkpoint's tensors under the names in memory. Rotary buffers are left out (they
    are recomputed).
    """
    found: State = {PROJECTOR + name: tensor for name, tensor in projector_from_original(state).items()}
    for key, tensor in state.items():
        if "mm_projector." in key or ".rotary_emb." in key:
            continue
        if key.startswith(ORIGINAL_TOWER):
            found[TOWER + key.removeprefix(ORIGINAL_TOWER)] = tensor
        elif key.startswith("model."):
            found[LLM + key.removeprefix("model.")] = tensor
        else:
            found[key] = tensor
    return found


def state_to_original(state: Mapping[str, torch.Tensor], interventions: Interventions) -> State:
    """The reverse of :func:`state_from_original`."""
    found = projector_to_original(projector_of(state), interventions)
    for name, tensor in state.items():
        if name.startswith(PROJECTOR):
            continue
        if name.startswith(TOWER):
            found[ORIGINAL_TOWER + name.removeprefix(TOWER)] = tensor
        elif name.startswith(LLM):
            found["model." + name.removeprefix(LLM)] = tensor
        else:
            found[name] = tensor
    return found
