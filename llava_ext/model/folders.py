"""What a model's folder says without its weights: tokenizer, vision config, pictures.

No model's code is loaded for it, so that a survey begins sooner.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer

from ..data.image_token import remove_image_token
from ..data.images import ImagePreprocessor
from .configuration_spatial_llava import SpatialLlavaConfig
from .interventions import Interventions
from .language_models import language_model, padding_token, text_model_type
from .towers import check_image_size, check_select_feature, registered_tower

AutoConfig.register("spatial_llava", SpatialLlavaConfig)


class BuildError(ValueError):
    """A model folder that cannot be used; the message names the folder, what was found and the fix."""


def load_tokenizer(folder: str | Path, model_max_length: int = 2048, padding_side: str = "right") -> Any:
    """The folder's tokenizer, set up so that :mod:`llava_ext.data.conversation` gives LLaVA's ids.

    The padding token is `<unk>`, as in LLaVA; where there is none, what :mod:`language_models` says of the
    family. An `<image>` token that an exported checkpoint's tokenizer has is taken out again: in training the
    text `<image>` of a sample without image is ordinary text.

    Raises:
        BuildError: no tokenizer there, or one whose padding token would also be a label.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder),
            legacy=False,
            model_max_length=model_max_length,
            padding_side=padding_side,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise BuildError(
            f"{folder}: no usable tokenizer ({error}); it needs tokenizer.model or tokenizer.json"
        ) from None
    remove_image_token(tokenizer)
    family = language_model(text_model_type(folder))
    padding = padding_token(tokenizer, family)
    if padding is None:
        raise BuildError(
            f"{folder}: the tokenizer has no <unk>, its padding token is {tokenizer.pad_token!r} and its end"
            f" token {tokenizer.eos_token!r}; padding is dropped from texts, so it must be a token of its"
            " own: set pad_token in tokenizer_config.json to one that no text holds (looked for:"
            f" {', '.join(family.padding)})"
        )
    tokenizer.pad_token = padding
    return tokenizer


def tower_config(folder: str | Path) -> Any:
    """The vision config of a registered tower's folder. Raises :class:`BuildError` with the register for
    any other.
    """
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        config = getattr(config, "vision_config", config)
        registered_tower(config.model_type)
    except (OSError, ValueError) as error:
        raise BuildError(f"{folder}: {error}") from None
    return config


def load_image_processor(folder: str | Path) -> Any:
    """The vision tower's image processor (Pillow backend)."""
    processor = getattr(transformers, registered_tower(tower_config(folder).model_type).processor)
    try:
        return processor.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise BuildError(
            f"{folder}: no image processor ({error}); it needs preprocessor_config.json"
        ) from None


def image_config(tower: str | Path, interventions: Interventions, keeps_all: bool) -> SpatialLlavaConfig:
    """A configuration that is right about pictures, and only about them: no weight and no language model is
    read.

    Args:
        keeps_all: what stands before the patches goes to the language model too (`cls_patch`).
    """
    vision = tower_config(tower)
    check_select_feature(vision, keeps_all)
    return SpatialLlavaConfig(
        vision_config=vision,
        vision_feature_select_strategy="full" if keeps_all else "default",
        **interventions.to_dict(),
        **picture_fields(vision, _stated_processor(tower) or load_image_processor(tower)),
    )


def _stated_processor(folder: str | Path) -> Any:
    """The settings of a folder's image processor, where they stand in its file one and all; None where
    defaults of transformers' class would complete them, or a processor's file comes before this one: that
    class loads every model's code, for seconds.
    """
    if (Path(folder) / "processor_config.json").exists():
        return None
    try:
        stated = json.loads((Path(folder) / "preprocessor_config.json").read_bytes())
        crop = stated["crop_size"] if stated["do_center_crop"] else {}
        levels = [*stated["image_mean"], *stated["image_std"]]
        whole = all(type(n) is int for n in [*stated["size"].values(), *crop.values(), stated["resample"]])
        known = whole and all(type(level) is float for level in levels) and len(levels) == 6
        return SimpleNamespace(**stated) if known and type(stated["do_center_crop"]) is bool else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def picture_fields(vision_config: Any, image_processor: Any) -> dict[str, Any]:
    """The fields of our config that say which pictures a tower gets. Raises ``TowerError`` when it cannot
    take them.
    """
    pixels = ImagePreprocessor.from_processor(image_processor)
    check_image_size(vision_config, pixels.size)
    return {
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
        "tower_image_size": None if pixels.size == vision_config.image_size else pixels.size,
    }
