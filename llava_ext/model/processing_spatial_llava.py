"""Processor of checkpoints with interventions: transformers' LLaVA processor that knows how long an image
is.
"""

from __future__ import annotations

from typing import Any

from transformers import LlavaProcessor
from transformers.image_utils import get_image_size, to_numpy_array

from .interventions import Interventions


class SpatialLlavaProcessor(LlavaProcessor):
    """``LlavaProcessor`` whose image placeholders follow compression and interleaved coordinates."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 1,
        interventions: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        self.interventions = Interventions.from_mapping(interventions or {}).to_dict()

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The text that stands for one image: placeholders and, with interleave, coordinates among them."""
        height, _ = get_image_size(to_numpy_array(image_inputs["pixel_values"][image_idx]))
        return self._image_text(height)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> Any:
        data = super()._get_num_multimodal_tokens(image_sizes, **kwargs)
        if image_sizes is not None:
            height = self.image_processor.crop_size["height"]
            data.num_image_tokens = [self._image_text(height).count(self.image_token)] * len(image_sizes)
        return data

    def _image_text(self, image_size: int) -> str:
        if self.patch_size is None:
            raise ValueError(
                "the processor has no patch_size; it is saved in processor_config.json beside the checkpoint"
            )
        interventions, grid = Interventions.from_mapping(self.interventions), image_size // self.patch_size
        if not interventions.interleave:
            full = self.vision_feature_select_strategy == "full"
            extra = self.num_additional_image_tokens if full else 0
            return self.image_token * interventions.tokens_per_image(grid, extra)
        side, pieces = interventions.final_side(grid), []
        for index in range(side * side):
            pieces.append(self.image_token)
            if (index + 1) % interventions.sparsity == 0:
                pieces.append("{},{}".format(*interventions.coordinates(index, side)))
        return "".join(pieces)


__all__ = ["SpatialLlavaProcessor"]
