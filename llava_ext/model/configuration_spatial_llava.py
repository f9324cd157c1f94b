"""Configuration of LLaVA with interventions: transformers' ``LlavaConfig`` plus the flags, flat, by their
names.

This file and its siblings ``interventions.py``, ``poolings.py``, ``towers.py``, ``projectors.py``,
``modeling_*`` and ``processing_*`` are copied beside exported checkpoints, so they import nothing else of
this package.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from transformers import LlavaConfig

from .interventions import DEFAULTS, FIELD_NAMES, InterventionError, Interventions
from .projectors import projector_depth
from .towers import Tower, registered_tower


def _flag_fields() -> type:
    """A dataclass with the fields of :class:`Interventions`, to inherit from: the flags are stated once."""
    hints = typing.get_type_hints(Interventions)
    fields = [(name, hints[name], dataclasses.field(default=default)) for name, default in DEFAULTS.items()]
    return dataclasses.make_dataclass("FlagFields", fields, kw_only=True)


class SpatialLlavaConfig(LlavaConfig, _flag_fields()):  # type: ignore[misc]
    """``LlavaConfig`` with LLaVA's projector types and the interventions.

    The fields of :class:`Interventions` are fields here, so that ``config.json`` shows every flag by its
    name. Building a configuration checks the flags against each other and against the vision tower.
    """

    model_type = "spatial_llava"

    projector_type: str = "mlp2x_gelu"
    # What the checkpoint was trained with; not used by the model itself.
    image_aspect_ratio: str | None = None
    prompt_version: str | None = None
    # Rows of the LLM's own vocabulary, when an exported checkpoint has rows for the image token after them.
    llm_vocab_size: int | None = None
    # Pixel statistics, for pixel values that arrive as uint8.
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    # Side of the pictures in pixels, where it is not the vision tower's own (DINOv2 takes any multiple of its
    # patches).
    tower_image_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in FIELD_NAMES:
            if isinstance(value := getattr(self, name), tuple):
                setattr(self, name, list(value))  # as JSON gives it
        projector_depth(self.projector_type)
        if not self.tokens_before:
            self.vision_feature_select_strategy = "full"  # stock LLaVA's `default` would drop the first patch
        interventions = self.interventions
        interventions.validate(self.grid_side, self.vision_config.num_hidden_layers, self.keeps_cls)
        statistics = interventions.fixed_statistics()
        if self.normalize_projector and statistics is not None:
            self.projector_max_norm, self.projector_scale = statistics
        self.image_seq_length = self.tokens_per_image

    def to_dict(self) -> dict[str, Any]:
        """As in transformers; recent flags only where they are not at their default, as in
        :meth:`Interventions.to_dict`.
        """
        left_out = set(FIELD_NAMES) - self.interventions.to_dict().keys()
        return {key: value for key, value in super().to_dict().items() if key not in left_out}

    @property
    def interventions(self) -> Interventions:
        """The flags as one object."""
        return Interventions.from_mapping({name: getattr(self, name) for name in FIELD_NAMES})

    @property
    def tower(self) -> Tower:
        """What the register says of the vision tower."""
        return registered_tower(self.vision_config.model_type)

    @property
    def tokens_before(self) -> int:
        """The tower's tokens before the first patch: class token and registers."""
        return self.tower.tokens_before(self.vision_config)

    @property
    def image_side(self) -> int:
        """Side of the tower's pictures in pixels."""
        return int(self.tower_image_size or self.vision_config.image_size)

    @property
    def grid_side(self) -> int:
        """Patches along one side of the vision tower's square grid; pixels that fill no patch are left
        out.
        """
        return self.image_side // int(self.vision_config.patch_size)

    @property
    def keeps_cls(self) -> bool:
        """True when the tokens before the patches go to the LLM too (LLaVA's `cls_patch`)."""
        return self.vision_feature_select_strategy == "full" and self.tokens_before > 0

    @property
    def tokens_per_image(self) -> int:
        """Vision tokens of one image at the LLM's input, without interleaved coordinates."""
        extra = self.tokens_before if self.keeps_cls else 0
        return self.interventions.tokens_per_image(self.grid_side, extra)

    @property
    def is_stock(self) -> bool:
        """True when transformers' own LLaVA computes the same.

        No intervention, a two-layer projector, and not more than one token to be dropped before the patches.
        """
        drops = 0 if self.keeps_cls else self.tokens_before
        return self.interventions.is_vanilla and self.projector_type == "mlp2x_gelu" and drops <= 1

    @classmethod
    def from_stock(cls, config: LlavaConfig, **changes: Any) -> SpatialLlavaConfig:
        """The same model as a stock configuration describes, with fields changed."""
        if isinstance(config.vision_feature_layer, list):
            raise InterventionError(
                f"vision_feature_layer: found {config.vision_feature_layer}; one layer is expected; "
                "several layers are use_multilayer_features with multilayer_layers"
            )
        before = registered_tower(config.vision_config.model_type).tokens_before(config.vision_config)
        if config.vision_feature_select_strategy == "default" and before != 1:
            raise InterventionError(
                "vision_feature_select_strategy: found `default`, which leaves out one token, but this tower"
                f" has {before} before its patches; such a model is not supported, `full` is"
            )
        fields = {
            key: value
            for key, value in config.to_dict().items()
            if key not in ("model_type", "architectures", "auto_map")
        }
        fields |= {"vision_config": config.vision_config, "text_config": config.text_config}
        return cls(**(fields | changes))

    def to_stock(self) -> LlavaConfig:
        """A ``LlavaConfig`` for the same model. Raises ``ValueError`` when transformers' own class could
        not compute it.
        """
        if not self.is_stock:
            raise ValueError(
                f"projector {self.projector_type} with"
                f" {', '.join(self.interventions.active) or 'no intervention'} and {self.tokens_before}"
                " tokens before the patches is no stock LLaVA model; save it as spatial_llava"
            )
        own = {
            name for name in type(self).__dataclass_fields__ if name not in LlavaConfig.__dataclass_fields__
        }
        kept = {"image_aspect_ratio", "prompt_version", "llm_vocab_size"}
        if self.tower_image_size is not None:
            kept.add("tower_image_size")
        dropped = (own - kept) | {"model_type", "architectures", "auto_map"}
        fields = {key: value for key, value in self.to_dict().items() if key not in dropped}
        return LlavaConfig(**fields)


__all__ = ["SpatialLlavaConfig"]
