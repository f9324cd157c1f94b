"""``build_model`` puts a fresh projector between a language model and a vision tower;
``checkpoints/stored.py`` reads and writes finished checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
)

from ..data.image_token import image_token_id
from ..distributed.gather import whole
from ..patches import without_zero3
from .configuration_spatial_llava import SpatialLlavaConfig
from .folders import BuildError, load_image_processor, load_tokenizer, picture_fields
from .interventions import Interventions
from .modeling_spatial_llava import SpatialLlavaForConditionalGeneration
from .parts import load_llm, load_tower
from .processing_spatial_llava import SpatialLlavaProcessor
from .towers import check_select_feature

AutoModelForImageTextToText.register(SpatialLlavaConfig, SpatialLlavaForConditionalGeneration)
AutoProcessor.register(SpatialLlavaConfig, SpatialLlavaProcessor)


def build_model(
    llm: str | Path,
    tower: str | Path,
    interventions: Interventions | None = None,
    projector_type: str = "mlp2x_gelu",
    vision_feature_layer: int = -2,
    vision_feature_select_strategy: str = "default",
    attn_implementation: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    model_max_length: int = 2048,
    **config_fields: Any,
) -> tuple[SpatialLlavaForConditionalGeneration, Any, Any]:
    """A model from a language model's and a vision tower's folder, with a new projector; its tokenizer and
    image processor.

    The projector is initialised as LLaVA's (PyTorch's own initialisation of linear layers), from torch's
    current random state. With ``normalize_statistics: auto`` the statistics are measured on the language
    model here and kept in ``model.config``.

    Args:
        vision_feature_select_strategy: `default` drops the CLS token (LLaVA's `patch`), `full` keeps it
            (`cls_patch`).
        attn_implementation: `eager`, `sdpa` or `flash_attention_2`; None lets transformers choose.
        config_fields: further fields of :class:`SpatialLlavaConfig`, e.g. ``image_aspect_ratio``.

    Raises:
        BuildError: a folder is incomplete or of the wrong kind.
        InterventionError: the interventions do not fit the tower, or each other.
    """
    chosen = interventions or Interventions()
    tokenizer = load_tokenizer(llm, model_max_length)
    image_processor = load_image_processor(tower)
    vision = load_tower(tower, dtype, attn_implementation)
    # Before the language model is read, so that a wrong flag costs seconds.
    keeps_all = vision_feature_select_strategy == "full"
    check_select_feature(vision.config, keeps_all)
    fields = picture_fields(vision.config, image_processor)
    side = fields["tower_image_size"] or vision.config.image_size
    chosen.validate(side // vision.config.patch_size, vision.config.num_hidden_layers, keeps_all)
    language = load_llm(llm, dtype, attn_implementation)
    chosen = resolve_statistics(chosen, language.get_input_embeddings(), len(tokenizer))
    config_fields |= fields | {
        "projector_type": projector_type,
        "vision_feature_layer": vision_feature_layer,
        "vision_feature_select_strategy": vision_feature_select_strategy,
        "image_token_index": image_token_id(tokenizer),
    }
    config = SpatialLlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        tie_word_embeddings=language.config.tie_word_embeddings,
        **chosen.to_dict(),
        **config_fields,
    )
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    model = assembled(config, language, vision)
    return model, tokenizer, image_processor


def assembled(config: SpatialLlavaConfig, language: Any, vision: Any) -> SpatialLlavaForConditionalGeneration:
    """The model around existing parts; only the projector is new."""
    with torch.device("meta"), without_zero3():
        model = SpatialLlavaForConditionalGeneration(config)
    core: Any = model.model
    projector = core.multi_modal_projector.to_empty(device=language.device)
    reset_projector(projector)
    core.multi_modal_projector = projector.to(language.dtype)
    core.vision_tower, core.language_model, model.lm_head = vision, language.base_model, language.lm_head
    config.vision_config, config.text_config = vision.config, language.config
    config.dtype = language.dtype
    model.generation_config = language.generation_config
    model.tie_weights()
    return model.train()


def reset_projector(projector: nn.Module) -> None:
    """LLaVA's initialisation: PyTorch's default for linear layers, ones for the normalisation's weight.

    The numbers are drawn on the CPU in float32, so that they depend neither on the device nor on the
    precision.
    """
    for module in projector.modules():
        if isinstance(module, nn.Linear):
            drawn = nn.Linear(
                module.in_features, module.out_features, module.bias is not None, "cpu", torch.float32
            )
            module.load_state_dict(drawn.state_dict())
    norm = getattr(projector, "norm", None)
    if norm is not None:
        nn.init.ones_(norm.weight)


def resolve_statistics(interventions: Interventions, embedding: nn.Module, vocabulary: int) -> Interventions:
    """The interventions with ``projector_max_norm`` and ``projector_scale`` filled in, if normalisation is
    on.

    `auto` sets the clip to the mean Euclidean norm of the language model's token embeddings and the scale to
    1: a new projector's tokens (whose weight is ones) then all have exactly the mean norm of text tokens.
    Rows of zeros and rows that the tokenizer does not use are left out.
    """
    if not interventions.normalize_projector:
        return interventions
    statistics = interventions.fixed_statistics()
    if statistics is None:
        statistics = (mean_token_norm(embedding, vocabulary), 1.0)
    return interventions.with_statistics(*statistics)


def mean_token_norm(embedding: nn.Module, vocabulary: int) -> float:
    """Mean Euclidean norm of the used rows of an embedding table; also under ZeRO-3, where every rank must
    call it.
    """
    weight: Any = embedding.weight
    with whole(weight):
        # on the CPU: a GPU adds up in another order
        norms = weight.detach()[:vocabulary].float().cpu().norm(dim=-1)
        norms = norms[norms > 0]
        if not len(norms) or not torch.isfinite(norms).all():
            raise BuildError(
                "normalize_statistics: `auto` found no finite, non-zero token embeddings in the language"
                " model"
            )
        return float(norms.double().mean())
