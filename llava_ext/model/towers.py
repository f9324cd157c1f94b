"""The register of vision towers: all in which they differ for LLaVA.

To add a tower, add an entry. Plain standard library: the workflow reads it too, and it is copied beside
exported checkpoints, so it imports nothing of this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class TowerError(ValueError):
    """A vision tower that is not registered or does not fit; the message says what was found and what is
    allowed.
    """


@dataclass(frozen=True)
class Tower:
    """One family of vision towers, as transformers builds them.

    The modules that FSDP splits are transformers' own statement (``_no_split_modules``) and are read there.

    Attributes:
        title: its name in messages.
        closing_norm: the module that normalises the last layer's output; `use_multilayer_features` puts each
            pick through it.
        processor: transformers' image processor (Pillow) whose defaults complete the folder's settings. It
            says the size as a shortest edge and a crop (CLIP, DINOv2), or as height and width (SigLIP).
        class_token: whether a class token stands before the patches.
        registers: the config's field with the number of register tokens between class token and patches, if
            there are any.
        any_size: whether the tower takes pictures of another size than its config's, with interpolated
            positions.
        original_prefix: of its weights in LLaVA's own layout; None where LLaVA's code has no such tower.
    """

    title: str
    closing_norm: str
    processor: str
    class_token: bool
    registers: str | None = None
    any_size: bool = False
    original_prefix: str | None = None

    def tokens_before(self, vision_config: Any) -> int:
        """How many of the tower's tokens come before the first patch."""
        return int(self.class_token) + int(getattr(vision_config, self.registers or "", 0))


# By transformers' model_type.
TOWERS: dict[str, Tower] = {
    "clip_vision_model": Tower(
        title="CLIP",
        closing_norm="post_layernorm",
        processor="CLIPImageProcessorPil",
        class_token=True,
        original_prefix="model.vision_tower.vision_tower.vision_model.",
    ),
    "siglip_vision_model": Tower(
        title="SigLIP and SigLIP 2 of fixed resolution",
        closing_norm="post_layernorm",
        processor="SiglipImageProcessorPil",
        class_token=False,
    ),
    "dinov2": Tower(
        title="DINOv2",
        closing_norm="layernorm",
        processor="BitImageProcessorPil",
        class_token=True,
        any_size=True,
    ),
    "dinov2_with_registers": Tower(
        title="DINOv2 with registers",
        closing_norm="layernorm",
        processor="BitImageProcessorPil",
        class_token=True,
        registers="num_register_tokens",
        any_size=True,
    ),
}


def known_towers() -> str:
    """The register as a list for messages."""
    return ", ".join(f"{entry.title} ({name})" for name, entry in TOWERS.items())


def registered_tower(model_type: str) -> Tower:
    """The entry of a model type. Raises :class:`TowerError` with the list for any other."""
    if model_type not in TOWERS:
        raise TowerError(
            f"found a {model_type} model as the vision tower; a registered one is expected: {known_towers()}"
        )
    return TOWERS[model_type]


def check_image_size(vision_config: Any, size: int) -> None:
    """Refuses pictures of a size that the tower cannot take.

    Args:
        size: side in pixels of what the image processor gives.
    """
    entry, own = registered_tower(vision_config.model_type), int(vision_config.image_size)
    patch = int(vision_config.patch_size)
    if entry.any_size and size % patch:
        raise TowerError(
            f"the image processor gives {size} pixels a side, which is no multiple of the {entry.title}"
            f" tower's patches of {patch}; set crop_size in preprocessor_config.json to"
            f" {max(1, size // patch) * patch}"
        )
    if not entry.any_size and size != own:
        raise TowerError(
            f"the image processor gives {size} pixels a side, the {entry.title} tower takes {own}; "
            f"set its size in preprocessor_config.json to {own}"
        )


def check_select_feature(vision_config: Any, keeps_all: bool) -> None:
    """Refuses `cls_patch` (``keeps_all``) for a tower without a class token."""
    entry = registered_tower(vision_config.model_type)
    if keeps_all and not entry.tokens_before(vision_config):
        raise TowerError(
            f"mm_vision_select_feature: found cls_patch, but a {entry.title} tower has no class token that"
            " could be kept; use patch"
        )
