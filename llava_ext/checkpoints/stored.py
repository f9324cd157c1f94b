"""Finished checkpoints: any of them read, ours written."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from ..data.chat import chat_of
from ..data.conversation import end_ids
from ..data.image_token import name_tokenizer, with_image_token, with_marked_images, without_added_ids
from ..data.images import ImagePreprocessor
from ..data.templates import dialogue_jinja, template
from ..files import flush, follow_umask
from ..model.configuration_spatial_llava import SpatialLlavaConfig
from ..model.folders import BuildError, load_tokenizer, picture_fields
from ..model.modeling_spatial_llava import SpatialLlavaForConditionalGeneration
from ..model.parts import require_complete
from ..model.processing_spatial_llava import SpatialLlavaProcessor
from ..patches import without_zero3
from .generation import exported_generation

# Exported vocabularies grow to a multiple of this, as in the published HF checkpoints of LLaVA (32000 ->
# 32064).
VOCABULARY_STEP = 64


def load_model(
    folder: str | Path,
    dtype: torch.dtype | None = torch.float32,
    attn_implementation: str | None = None,
    model_max_length: int = 2048,
    llm: str | Path | None = None,
    tower: str | Path | None = None,
) -> tuple[SpatialLlavaForConditionalGeneration, Any, Any]:
    """Model, tokenizer and image processor of a finished checkpoint: ours, stock LLaVA's, or an original
    LLaVA folder.

    Args:
        llm, tower: for original LLaVA folders: the base model of a stage-1 projector, and the vision tower
            when the path in its config does not exist here.

    Raises:
        BuildError: a folder that is none of these, or incomplete.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise BuildError(f"{folder}: no config.json; a checkpoint folder is expected")
    if _is_original(path):
        from ..checkpoints import original

        return original.load_original(
            path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            model_max_length=model_max_length,
            llm=llm,
            tower=tower,
        )
    config, image_processor = _stored_config(path), _stored_image_processor(path)
    config.tower_image_size = picture_fields(config.vision_config, image_processor)["tower_image_size"]
    config.image_seq_length = config.tokens_per_image
    model, info = SpatialLlavaForConditionalGeneration.from_pretrained(
        str(path),
        config=config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        output_loading_info=True,
    )
    require_complete(folder, info)
    shrink_vocabulary(model)
    return model, load_tokenizer(path, model_max_length), image_processor


def _read_config(path: Path) -> dict[str, Any]:
    content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _is_original(path: Path) -> bool:
    """Original LLaVA configs name their vision tower and have no nested configs; their model types are
    many (`llava_llama2d`).
    """
    content = _read_config(path)
    return "mm_vision_tower" in content and "text_config" not in content


def _stored_config(path: Path) -> SpatialLlavaConfig:
    """Our configuration for a checkpoint in transformers' format. Raises :class:`BuildError` for another
    kind of model.
    """
    kind = _read_config(path).get("model_type")
    if kind == "spatial_llava":
        return SpatialLlavaConfig.from_pretrained(str(path))
    if kind == "llava":
        return SpatialLlavaConfig.from_stock(LlavaConfig.from_pretrained(str(path)))
    raise BuildError(f"{path}: model_type is {kind!r}; allowed are spatial_llava, llava and llava_llama")


def _stored_image_processor(path: Path) -> Any:
    """The image processor saved in a checkpoint, inside processor_config.json or as a file of its own."""
    try:
        return LlavaImageProcessorPil.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise BuildError(
            f"{path}: no image processor ({error}); it needs processor_config.json or"
            " preprocessor_config.json"
        ) from None


def shrink_vocabulary(model: SpatialLlavaForConditionalGeneration) -> None:
    """Takes away the rows that :func:`save_checkpoint` added for `<image>`, so that the LLM is again as it
    was trained.
    """
    rows = model.config.llm_vocab_size
    if rows is not None and rows < model.config.text_config.vocab_size:
        model.resize_token_embeddings(rows)
    model.config.llm_vocab_size = None


def save_checkpoint(
    model: SpatialLlavaForConditionalGeneration,
    tokenizer: Any,
    image_processor: Any,
    folder: str | Path,
    prompt_version: str | None = None,
    image_aspect_ratio: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Writes a finished checkpoint that transformers loads.

    Without interventions (and with the usual two-layer projector) it is a stock LLaVA checkpoint and needs no
    code of ours. Otherwise this package's model code is saved beside the weights and loads with
    ``trust_remote_code=True``. Both get rows for the `<image>` token: the mean of the other rows, whose logit
    is the mean logit and so never the largest.

    Args:
        state_dict: the gathered weights, by their names in memory, when ``model`` holds only a part of them
            (ZeRO-3, FSDP).
    """
    config = copy.deepcopy(model.config)
    config.prompt_version = prompt_version or config.prompt_version
    config.image_aspect_ratio = image_aspect_ratio or config.image_aspect_ratio
    config.text_config.use_cache = True  # training turns it off
    weights = dict(model.state_dict() if state_dict is None else state_dict)
    extend_vocabulary(config, weights)
    clone = _empty_clone(config)
    clone.load_state_dict(weights, strict=True, assign=True)
    clone.tie_weights()
    ends = end_ids(tokenizer, config.prompt_version)
    clone.generation_config = exported_generation(model.generation_config, ends)
    processor = make_processor(config, tokenizer, image_processor)
    with _staged(Path(folder)) as staging, _auto_classes(config), without_zero3():
        clone.save_pretrained(str(staging), save_original_format=True, max_shard_size=max_shard_size)
        processor.save_pretrained(str(staging))
        name_tokenizer(staging, processor.tokenizer, "PreTrainedTokenizerFast")


def save_tower(tower: Any, weights: Mapping[str, Tensor], image_processor: Any, folder: Path) -> None:
    """Writes a vision tower as a folder like the one it was read from.

    Args:
        tower: what was trained, whose parameters may be split over processes.
        weights: all of it, by its own names.
    """
    with torch.device("meta"), without_zero3():
        clone = AutoModel.from_config(tower.config)
    clone.load_state_dict(dict(weights), strict=True, assign=True)
    # how the names in its files differ from those in memory: other programs read the former
    clone._weight_conversions = getattr(tower, "_weight_conversions", None)
    with without_zero3():
        clone.save_pretrained(str(folder))
    image_processor.save_pretrained(str(folder))


def _empty_clone(config: SpatialLlavaConfig) -> Any:
    """A model of the class that the checkpoint is for, without memory for its weights."""
    with torch.device("meta"), without_zero3():
        if config.is_stock:
            return LlavaForConditionalGeneration(config.to_stock())
        return SpatialLlavaForConditionalGeneration(config)


def extend_vocabulary(config: SpatialLlavaConfig, weights: dict[str, Tensor]) -> None:
    """Adds rows for `<image>` to the embedding table and the head, in place; nothing when its id is inside
    the vocabulary.
    """
    rows = config.text_config.vocab_size
    if config.image_token_id < rows:
        return
    wanted = -(-(config.image_token_id + 1) // VOCABULARY_STEP) * VOCABULARY_STEP
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            table = weights[name]
            mean = table.float().mean(0, keepdim=True).to(table.dtype)
            weights[name] = torch.cat([table, mean.expand(wanted - rows, -1)])
    config.llm_vocab_size = rows
    config.text_config.vocab_size = wanted


def make_processor(config: SpatialLlavaConfig, tokenizer: Any, image_processor: Any) -> Any:
    """The processor that fits a checkpoint: stock LLaVA's, or ours when there are interventions."""
    pixels = ImagePreprocessor.from_processor(image_processor, config.image_aspect_ratio)
    square = {"height": pixels.size, "width": pixels.size}
    edge = pixels.size if pixels.aspect_ratio == "pad" else pixels.edge
    saved_images = LlavaImageProcessorPil(
        size={"shortest_edge": edge} if edge and pixels.edge != 0 else square,
        crop_size=square,
        resample=pixels.resample,
        image_mean=list(pixels.mean),
        image_std=list(pixels.std),
        do_pad=pixels.aspect_ratio == "pad",
    )
    shared: dict[str, Any] = {
        "image_processor": saved_images,
        "tokenizer": with_image_token(tokenizer),
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": config.tokens_before,
    }
    if config.is_stock:
        processor: Any = LlavaProcessor(**shared)
    else:
        processor = SpatialLlavaProcessor(**shared, interventions=config.interventions.to_dict())
    block = processor.replace_image_token({"pixel_values": [torch.empty(3, pixels.size, pixels.size)]}, 0)
    _write_prompts(processor, tokenizer, config.prompt_version, block)
    return processor


def _write_prompts(processor: Any, tokenizer: Any, version: str | None, block: str) -> None:
    """Gives a processor the tokenizer and the chat template with which any client's prompt has the ids of
    training.
    """
    style = None if version is None else template(version)
    if style is not None and style.style == "tokenizer":
        processor.tokenizer = without_added_ids(tokenizer)
        processor.chat_template = chat_of(tokenizer).exported
    else:
        processor.tokenizer = with_marked_images(tokenizer, block)
        processor.chat_template = dialogue_jinja(style) if style and style.style == "dialogue" else None
    processor.tokenizer.chat_template = None  # the processor's counts; two would differ
    processor.tokenizer.padding_side = "left"  # a checkpoint is for generation, which needs it


@contextmanager
def _auto_classes(config: SpatialLlavaConfig) -> Any:
    """While it lasts, saving copies the code of our classes beside the weights (not for stock
    checkpoints).
    """
    classes: dict[Any, str] = {
        SpatialLlavaConfig: "AutoConfig",
        SpatialLlavaForConditionalGeneration: "AutoModelForImageTextToText",
        SpatialLlavaProcessor: "AutoProcessor",
    }
    if config.is_stock:
        classes = {}
    for cls, name in classes.items():
        cls.register_for_auto_class(name)
    try:
        yield
    finally:
        for cls in classes:
            cls._auto_class = None


@contextmanager
def _staged(folder: Path) -> Any:
    """Yields a temporary folder inside ``folder``; its files move into place when all are written,
    config.json last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f".saving.{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        follow_umask(staging)
        files = sorted(staging.iterdir(), key=lambda path: path.name == "config.json")
        for path in files:
            flush(path)
        for path in files:
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
