"""LLaVA with interventions, as a small subclass of transformers' own model.

With all flags off the outputs equal ``LlavaForConditionalGeneration``'s bit for bit. Where each flag acts:

    pixel_values -> tower -> [layers: use_multilayer_features] -> [+ x, y channels: add_spatial_coordinates]
        -> projector -> [normalize_projector] -> [pool: compression_after_projection] -> placeholders in the
        sequence
    sequence -> rotary positions [twoD_vision_embedding] -> LLM

``interleave`` acts on the text around the placeholders, so it lives in the collator and the processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.llava.modeling_llava import (
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaModelOutputWithPast,
    LlavaPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple

from .configuration_spatial_llava import SpatialLlavaConfig
from .interventions import PUBLISHED_GRID_SIDE
from .poolings import POOLINGS
from .projectors import projector_depth

# The language model's attention that computes each sample of a packed row by itself; see attention.py.
VARLEN = "varlen"
NORM_EPS = 1e-6
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class SpatialProjector(nn.Module):
    """LLaVA's projector (`linear`, `mlpNx_gelu`), with optional coordinates before and normalisation after
    it.

    The linear layers are called ``linear_1`` ... ``linear_N``, as in transformers' projector.
    """

    def __init__(self, config: SpatialLlavaConfig) -> None:
        super().__init__()
        interventions = config.interventions
        width, hidden = (
            interventions.projector_width(config.vision_config.hidden_size),
            config.text_config.hidden_size,
        )
        self.depth = projector_depth(config.projector_type)
        for index in range(1, self.depth + 1):
            self.add_module(
                f"linear_{index}",
                nn.Linear(width if index == 1 else hidden, hidden, bias=config.multimodal_projector_bias),
            )
        self.act = ACT2FN[config.projector_hidden_act]
        self.coordinates = interventions.add_spatial_coordinates
        self.norm: TokenNorm | None = None
        if interventions.normalize_projector:
            statistics = interventions.fixed_statistics()
            if statistics is None:
                raise ValueError(
                    "normalize_statistics: `auto` must be measured on an LLM first; build the model with"
                    " llava_ext.model.build"
                )
            self.norm = TokenNorm(hidden, *statistics)

    def forward(self, features: Tensor) -> Tensor:
        """(images, patches, channels) -> (images, patches, hidden)."""
        if self.coordinates:
            features = torch.cat([features, patch_coordinates(features)], dim=-1)
        hidden = self.get_submodule("linear_1")(features)
        for index in range(2, self.depth + 1):
            hidden = self.get_submodule(f"linear_{index}")(self.act(hidden))
        return hidden if self.norm is None else self.norm(hidden)


class TokenNorm(nn.Module):
    """RMS norm with a learned weight, then the token's Euclidean norm clipped at ``max_norm`` and scaled by
    ``scale``.

    With the initial weight of ones every token gets the norm ``max_norm * scale``. No mean is subtracted.
    """

    def __init__(self, width: int, max_norm: float, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.max_norm, self.scale = max_norm, scale

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden), computed in float32 whatever the dtype."""
        x = tokens.float()
        x = self.weight.float() * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
        return (x * (self.max_norm / norm).clamp(max=1.0) * self.scale).to(tokens.dtype)


def patch_coordinates(features: Tensor) -> Tensor:
    """x and y in [-1, 1] of each patch of a square grid, row by row: (images, side * side, 2), x first."""
    images, patches, _ = features.shape
    side = round(patches**0.5)
    axis = torch.linspace(-1, 1, side, device=features.device, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=-1).to(features.dtype).expand(images, -1, -1)


class SpatialLlavaModel(LlavaModel):
    """``LlavaModel`` whose vision path and positions follow the interventions."""

    config: SpatialLlavaConfig

    def __init__(self, config: SpatialLlavaConfig) -> None:
        super().__init__(config)
        self.multi_modal_projector = SpatialProjector(config)
        # Called on the vision tokens (images, tokens, hidden) just before they enter the sequence; see
        # diagnostics.py.
        self.vision_token_hook: Callable[[Tensor], Tensor] | None = None
        self.post_init()

    # -- vision --------------------------------------------------------------------------------------------

    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Vision tokens as the LLM gets them: ``pooler_output`` is a list of (tokens, hidden), one per image.

        Args:
            pixel_values: (images, 3, S, S), normalised floats, or uint8 to be normalised here.
        """
        kwargs.pop("return_dict", None)
        outputs = self._tower_outputs(self._normalised_pixels(pixel_values), vision_feature_layer, **kwargs)
        features = self._selected_features(outputs, vision_feature_layer, vision_feature_select_strategy)
        # A frozen tower may be kept in half precision while the projector trains in float32.
        tokens = self.multi_modal_projector(features.to(next(self.multi_modal_projector.parameters()).dtype))
        interventions = self.config.interventions
        if interventions.compression_after_projection:
            pool = POOLINGS[interventions.pooling].pool
            tokens = pool(tokens, interventions.final_side(self.config.grid_side))
        if self.vision_token_hook is not None:
            tokens = self.vision_token_hook(tokens)
        outputs.pooler_output = list(tokens)
        return outputs

    def _tower_outputs(self, pixel_values: Tensor, layer: int | None, **kwargs: Any) -> Any:
        """The tower's outputs with the hidden states that are needed; without a graph when the tower is
        frozen.
        """
        layers = self.config.interventions.feature_layers
        wanted: Any = (
            list(layers) if layers else (self.config.vision_feature_layer if layer is None else layer)
        )
        frozen = not any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        kwargs["output_hidden_states"] = kwargs.get("output_hidden_states") or wanted
        with torch.no_grad() if frozen else nullcontext():
            return self.vision_tower(pixel_values, return_dict=True, **kwargs)

    def _selected_features(self, outputs: Any, layer: int | None, strategy: str | None) -> Tensor:
        """(images, patches, channels) of the chosen layer, or of several layers after the tower's final
        norm.
        """
        layers = self.config.interventions.feature_layers
        if layers:
            norm = self.vision_tower.get_submodule(self.config.tower.closing_norm)
            states = [norm(outputs.hidden_states[index]) for index in layers]
            features = torch.cat(states, dim=-1)
        else:
            features = outputs.hidden_states[self.config.vision_feature_layer if layer is None else layer]
        keeps_all = (self.config.vision_feature_select_strategy if strategy is None else strategy) == "full"
        return features if keeps_all else features[:, self.config.tokens_before :]

    def _normalised_pixels(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.dtype != torch.uint8:
            return pixel_values
        statistics = [self.config.image_mean or CLIP_MEAN, self.config.image_std or CLIP_STD]
        mean, std = (
            torch.tensor(values, device=pixel_values.device).view(1, 3, 1, 1) for values in statistics
        )
        return (pixel_values.float() / 255 - mean) / std

    # -- sequence ------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        image_token_counts: Tensor | Sequence[int] | None = None,
        image_places: Tensor | None = None,
        image_offsets: Tensor | None = None,
        image_span: int | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """As ``LlavaModel.forward``, and:

        Args:
            input_ids: (batch, tokens); the image placeholder may lie outside the LLM's vocabulary.
            position_ids: (batch, tokens). Given without ``attention_mask`` and cache they mark packed
                samples: each starts at 0.
            image_token_counts: (images,), the placeholders of each image when sequences were cut inside an
                image; None when every image is whole.
            image_places, image_offsets: (vision tokens,), of each placeholder, row by row, its place in the
                flattened batch and its number within its image. Who knows them (a training's collator) spares
                the device the search, for which the host would wait; numbers are given as a list then.
            image_span: and how many columns lie between the first and the last that hold a placeholder.

        Raises:
            ValueError: placeholders without pixel values, or numbers of placeholders and vision tokens that
                differ.
        """
        is_image: Any = None
        image_tokens: Tensor | None = None
        placeholders: Placeholders | None = None
        if input_ids is not None and inputs_embeds is None:
            is_image = input_ids == self.config.image_token_id
            # The placeholder's own row is never used; any valid id keeps an id beyond the vocabulary from
            # indexing it.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        vision = (vision_feature_layer, vision_feature_select_strategy, image_sizes)
        images = self._images(pixel_values, mm_encoder_outputs, *vision)
        if images is not None:
            image_tokens, counts = self._kept_tokens(images, image_token_counts)
            placeholders = Placeholders.found(is_image, counts, image_places, image_offsets, image_span)
            inputs_embeds = self._merged(inputs_embeds, placeholders, image_tokens)
        elif is_image is not None:
            if image_places is None or len(image_places):
                _refuse_placeholders(is_image, past_key_values)
            inputs_embeds = self._without_images(inputs_embeds)
        packed = attention_mask is None and position_ids is not None and past_key_values is None
        if packed and kwargs.get("use_cache") is None:
            kwargs["use_cache"] = False  # with a cache transformers would ignore the packing, silently
        if self.language_model.config._attn_implementation == VARLEN:
            kwargs = self._with_segments(inputs_embeds, attention_mask, past_key_values, kwargs)
        with self._grid_positions(placeholders):
            outputs = super().forward(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        outputs.image_hidden_states = image_tokens
        return outputs

    def _images(self, pixel_values: Tensor | None, encoded: Mapping[str, Any] | None, *vision: Any) -> Any:
        """Vision tokens of each image, already encoded (by ``generate``) or to be encoded; None without
        images.
        """
        if encoded and encoded.get("image") is not None:
            return encoded["image"].pooler_output
        return None if pixel_values is None else self.get_image_features(pixel_values, *vision).pooler_output

    def _with_segments(
        self, inputs_embeds: Any, attention_mask: Any, past_key_values: Any, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments with the segments of ``varlen`` attention; a row without packing is one."""
        if attention_mask is not None or past_key_values is not None or kwargs.get("use_cache"):
            raise ValueError(
                "attention varlen is for training: rows packed or padded on the right, without a mask or"
                " cache; load the model with sdpa for anything else"
            )
        if kwargs.get("cu_seq_lens_q") is not None:
            return kwargs
        rows, tokens, _ = inputs_embeds.shape
        ends = torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=inputs_embeds.device)
        return kwargs | {"cu_seq_lens_q": ends, "max_length_q": tokens}

    def _kept_tokens(
        self, images: Any, counts: Tensor | Sequence[int] | None
    ) -> tuple[Tensor, Sequence[int]]:
        """The vision tokens that have a placeholder, (tokens, hidden), and how many of each image."""
        whole = [len(image) for image in images]
        kept = counts.tolist() if isinstance(counts, Tensor) else whole if counts is None else counts
        if len(kept) != len(whole) or any(count > length for count, length in zip(kept, whole, strict=False)):
            raise ValueError(
                f"image_token_counts: found {kept} for images with {whole} tokens; one number up to that is"
                " expected each"
            )
        return torch.cat([image[:count] for image, count in zip(images, kept, strict=True)]), kept

    def _merged(
        self, inputs_embeds: Tensor | None, placeholders: Placeholders, image_tokens: Tensor
    ) -> Tensor:
        """The embeddings with vision tokens in the places of the placeholders."""
        if inputs_embeds is None:
            raise ValueError(NO_PLACES)
        found = len(placeholders.places)
        if found != len(image_tokens):
            raise ValueError(
                f"Image features and image tokens do not match: {found} placeholders in input_ids,"
                f" {len(image_tokens)} vision tokens ({self.config.tokens_per_image} for a whole image);"
                " expand each image with the collator or the processor"
            )
        image_tokens = image_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
        flat = inputs_embeds.flatten(0, 1).index_copy(0, placeholders.places, image_tokens)
        return flat.view_as(inputs_embeds)

    def _without_images(self, inputs_embeds: Any) -> Tensor:
        """A batch without pixels; in training the vision path stays in the graph.

        Every rank of a distributed training must run the same modules in the same order. A zero image goes
        through tower and projector and none of its tokens is used, so that its gradients are exactly zero.
        """
        if not (self.training and torch.is_grad_enabled()):
            return inputs_embeds
        path = (self.multi_modal_projector, self.vision_tower)
        trains = any(parameter.requires_grad for part in path for parameter in part.parameters())
        # Ranks that hold only a part of the tower's weights gather them together (ZeRO-3, FSDP), trained or
        # not.
        if not (trains or any(map(_is_split, self.vision_tower.parameters()))):
            return inputs_embeds
        side = self.config.image_side
        blank = torch.zeros(1, 3, side, side, device=inputs_embeds.device, dtype=self.vision_tower.dtype)
        unused = self.get_image_features(blank).pooler_output[0][:0].to(inputs_embeds.dtype)
        flat = torch.cat([inputs_embeds.flatten(0, 1), unused])
        return flat.view_as(inputs_embeds)

    # -- positions -----------------------------------------------------------------------------------------

    @contextmanager
    def _grid_positions(self, placeholders: Placeholders | None) -> Iterator[None]:
        """While it lasts, the LLM's rotary tables give vision tokens positions in two dimensions."""
        if not (self.config.twoD_vision_embedding and placeholders):
            yield
            return
        table = _published_table if self.config.published_behaviour else _grid_table
        side = self.config.interventions.final_side(self.config.grid_side)

        def replace(
            module: nn.Module, args: Any, kwargs: dict[str, Any], output: tuple[Tensor, Tensor]
        ) -> Any:
            hidden_states = args[0] if args else kwargs["x"]
            position_ids = args[1] if len(args) > 1 else kwargs["position_ids"]
            return table(module, hidden_states, position_ids, placeholders, side, output)

        handle = self.language_model.rotary_emb.register_forward_hook(replace, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()


NO_PLACES = (
    "pixel values need input_ids with image placeholders; inputs_embeds alone do not show where images go"
)


@dataclass(frozen=True)
class Placeholders:
    """Where a batch's image placeholders are.

    Attributes:
        is_image: (batch, tokens), True at a placeholder.
        places: (vision tokens,), their places in the flattened batch, row by row.
        offsets: (vision tokens,), the number of each within its image.
        span: columns from the first to the last with a placeholder in any row; None where nobody has looked.
    """

    is_image: Tensor
    places: Tensor
    offsets: Tensor
    span: int | None = None

    @classmethod
    def found(
        cls,
        is_image: Tensor | None,
        counts: Sequence[int],
        places: Tensor | None,
        offsets: Tensor | None,
        span: int | None,
    ) -> Placeholders:
        """From what is known; the rest is looked for."""
        if is_image is None:
            raise ValueError(NO_PLACES)
        if places is None:
            places = is_image.flatten().nonzero().squeeze(-1)
        if offsets is None:
            offsets = torch.cat([torch.arange(count) for count in counts]).to(places.device)
        return cls(is_image, places, offsets, span)


def _refuse_placeholders(is_image: Tensor, past_key_values: Any) -> None:
    prefill = past_key_values is None or past_key_values.get_seq_length() == 0
    if prefill and bool(is_image.any()):
        raise ValueError(
            f"input_ids hold {int(is_image.sum())} image placeholders, but no pixel_values were given; "
            "pass the images or remove the placeholders"
        )


RotaryTable = tuple[Tensor, Tensor]


def _grid_table(
    rotary: nn.Module,
    hidden: Tensor,
    position_ids: Tensor,
    placeholders: Placeholders,
    side: int,
    plain: RotaryTable,
) -> RotaryTable:
    """cos and sin, (batch, tokens, head_dim), where vision tokens turn by row and column.

    Text keeps its ordinary position p. A vision token in row r and column c of an image that starts at
    position s gets the pair (s + r, s + c): rotary frequencies with an even index turn by the first, odd ones
    by the second. Both halves of a pair of channels turn by the same angle, so that each is a rotation and
    attention depends on differences only. Every image of every sample is counted on its own.
    """
    shape, places, offsets = placeholders.is_image.shape, placeholders.places, placeholders.offsets
    positions = position_ids.expand(shape).reshape(-1)
    first = places[torch.arange(len(places), device=places.device) - offsets]
    start = positions[first]
    row = start + torch.div(offsets, side, rounding_mode="floor")
    axes = (positions.index_copy(0, places, axis) for axis in (row, start + offsets % side))
    tables = [rotary.forward(hidden, axis.view(shape)) for axis in axes]
    half = plain[0].shape[-1] // 2
    by_row = (torch.arange(2 * half, device=hidden.device) % half) % 2 == 0
    (row_cos, row_sin), (column_cos, column_sin) = tables
    return torch.where(by_row, row_cos, column_cos), torch.where(by_row, row_sin, column_sin)


def _published_table(
    rotary: nn.Module,
    hidden: Tensor,
    position_ids: Tensor,
    placeholders: Placeholders,
    side: int,
    plain: RotaryTable,
) -> RotaryTable:
    """The published code's table: one per batch, a grid of 24, no rotation where row and column differ.

    Columns of the batch that hold an image token in any row are t = place - first such place; the first half
    of the channels turns by t // 24 and the second by t % 24, for all rows alike.

    Raises:
        ValueError: image tokens lie more than 575 places apart, as in the published code.
    """
    columns = placeholders.is_image.any(0)
    span = placeholders.span
    if span is None:
        where = columns.nonzero().squeeze(-1)
        span = int(where[-1] - where[0])
    if span >= PUBLISHED_GRID_SIDE**2:
        raise ValueError(
            f"twoD_vision_embedding with published_behaviour: image tokens lie {span} positions apart, at"
            f" most {PUBLISHED_GRID_SIDE**2 - 1} work; set published_behaviour: false or use one image a"
            " sample"
        )
    # In columns without an image token the numbers mean nothing, and are not taken.
    offset = torch.arange(len(columns), device=columns.device) - columns.int().argmax()
    axes = [torch.div(offset, PUBLISHED_GRID_SIDE, rounding_mode="floor"), offset % PUBLISHED_GRID_SIDE]
    (row_cos, row_sin), (column_cos, column_sin) = (
        rotary.forward(hidden, axis.unsqueeze(0)) for axis in axes
    )
    half = plain[0].shape[-1] // 2
    tables = []
    for text, by_row, by_column in zip(plain, (row_cos, row_sin), (column_cos, column_sin), strict=True):
        image = torch.cat([by_row[..., :half], by_column[..., half:]], dim=-1)
        text = text.expand(len(placeholders.is_image), -1, -1)
        tables.append(torch.where(columns[:, None], image.to(text.dtype), text))
    return tables[0], tables[1]


def _is_split(parameter: Tensor) -> bool:
    """Whether this rank holds only a part of the parameter: ZeRO-3's mark, or a DTensor of FSDP."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "full_tensor")


class SpatialLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """The whole model: ``SpatialLlavaModel`` and the LLM's head."""

    config_class = SpatialLlavaConfig
    config: SpatialLlavaConfig

    def __init__(self, config: SpatialLlavaConfig) -> None:
        # The parent's constructor would build the stock model first, at 7 billion parameters not a detail.
        LlavaPreTrainedModel.__init__(self, config)
        self.model = SpatialLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TokenNorm):
            init.ones_(module.weight)

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """As in transformers, but with the names of the modules in memory unless asked otherwise.

        Trainer resumes with ``load_state_dict``, which needs these names; the original format would be
        ignored silently.
        """
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


def _register_conversions() -> None:
    """Lets both classes read and write the layout of stock LLaVA checkpoints; without it weights are lost
    silently.
    """
    pairs = (
        ("spatial_llava", "llava"),
        ("SpatialLlavaForConditionalGeneration", "llava"),
        ("SpatialLlavaModel", "LlavaModel"),
    )
    for name, source in pairs:
        mapping = get_checkpoint_conversion_mapping(source)
        if mapping is not None and get_checkpoint_conversion_mapping(name) is None:
            register_checkpoint_conversion_mapping(name, mapping)


_register_conversions()

__all__ = ["SpatialLlavaForConditionalGeneration", "SpatialLlavaModel"]
