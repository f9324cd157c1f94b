"""Configuration of LLaVA with interventions: transformers' ``LlavaConfig`` plus the flags, flat, by their names.

This file, ``interventions.py`` and ``modeling_spatial_llava.py`` are copied beside exported checkpoints, so they import
nothing else of this package.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import LlavaConfig

from .interventions import FIELD_NAMES, InterventionError, Interventions

MLP_PROJECTOR = re.compile(r"mlp([1-9]\d*)x_gelu")


def projector_depth(projector_type: str) -> int:
    """Number of linear layers of LLaVA's projector types: `linear` -> 1, `mlpNx_gelu` -> N.

    Raises:
        ValueError: for any other name.
    """
    if projector_type == "linear":
        return 1
    match = MLP_PROJECTOR.fullmatch(projector_type)
    if match is None:
        raise ValueError(
            f"projector_type: found {projector_type!r}; allowed are `linear` and `mlpNx_gelu` such as `mlp2x_gelu`"
        )
    return int(match.group(1))


class SpatialLlavaConfig(LlavaConfig):
    """``LlavaConfig`` with LLaVA's projector types and the interventions.

    The fields of :class:`Interventions` are fields here, so that ``config.json`` shows every flag by its name. Building a
    configuration checks the flags against each other and against the vision tower.
    """

    model_type = "spatial_llava"

    projector_type: str = "mlp2x_gelu"
    normalize_projector: bool = False
    normalize_statistics: str = "vicuna-7b"
    projector_max_norm: float | None = None
    projector_scale: float | None = None
    use_multilayer_features: bool = False
    multilayer_layers: list[int] | tuple[int, ...] = (12, 16, 20, 24)
    compression_after_projection: bool = False
    final_spatial_size: int | None = None
    twoD_vision_embedding: bool = False
    interleave: bool = False
    interleave_sparsity: int | None = None
    add_spatial_coordinates: bool = False
    published_behaviour: bool = False
    # What the checkpoint was trained with; not used by the model itself.
    image_aspect_ratio: str | None = None
    prompt_version: str | None = None
    # Rows of the LLM's own vocabulary, when an exported checkpoint has rows for the image token after them.
    llm_vocab_size: int | None = None
    # Pixel statistics, for pixel values that arrive as uint8.
    image_mean: list[float] | None = None
    image_std: list[float] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.multilayer_layers = list(self.multilayer_layers)
        projector_depth(self.projector_type)
        interventions = self.interventions
        interventions.validate(self.grid_side, self.vision_config.num_hidden_layers, self.keeps_cls)
        statistics = interventions.fixed_statistics()
        if self.normalize_projector and statistics is not None:
            self.projector_max_norm, self.projector_scale = statistics
        self.image_seq_length = self.tokens_per_image

    @property
    def interventions(self) -> Interventions:
        """The flags as one object."""
        return Interventions.from_mapping({name: getattr(self, name) for name in FIELD_NAMES})

    @property
    def grid_side(self) -> int:
        """Patches along one side of the vision tower's square grid."""
        return int(self.vision_config.image_size) // int(self.vision_config.patch_size)

    @property
    def keeps_cls(self) -> bool:
        """True when the CLS token goes to the LLM too (LLaVA's `cls_patch`)."""
        return self.vision_feature_select_strategy == "full"

    @property
    def tokens_per_image(self) -> int:
        """Vision tokens of one image at the LLM's input, without interleaved coordinates."""
        return self.interventions.tokens_per_image(self.grid_side, int(self.keeps_cls))

    @property
    def is_stock(self) -> bool:
        """True when transformers' own LLaVA computes the same: no intervention, a two-layer projector."""
        return self.interventions.is_vanilla and self.projector_type == "mlp2x_gelu"

    @classmethod
    def from_stock(cls, config: LlavaConfig, **changes: Any) -> SpatialLlavaConfig:
        """The same model as a stock configuration describes, with fields changed."""
        if isinstance(config.vision_feature_layer, list):
            raise InterventionError(
                f"vision_feature_layer: found {config.vision_feature_layer}; one layer is expected; "
                "several layers are use_multilayer_features with multilayer_layers"
            )
        fields = {
            key: value
            for key, value in config.to_dict().items()
            if key not in ("model_type", "architectures", "auto_map")
        }
        fields |= {"vision_config": config.vision_config, "text_config": config.text_config}
        return cls(**(fields | changes))

    def to_stock(self) -> LlavaConfig:
        """A ``LlavaConfig`` for the same model. Raises ``ValueError`` when transformers' own class could not compute it."""
        if not self.is_stock:
            raise ValueError(
                f"projector {self.projector_type} with {', '.join(self.interventions.active) or 'no intervention'} "
                "is no stock LLaVA model; save it as spatial_llava"
            )
        own = {
            name for name in type(self).__dataclass_fields__ if name not in LlavaConfig.__dataclass_fields__
        }
        kept = {"image_aspect_ratio", "prompt_version", "llm_vocab_size"}
        dropped = (own - kept) | {"model_type", "architectures", "auto_map"}
        fields = {key: value for key, value in self.to_dict().items() if key not in dropped}
        return LlavaConfig(**fields)


__all__ = ["SpatialLlavaConfig"]
