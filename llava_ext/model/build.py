"""Models from folders, and folders from models.

``build_model`` puts a fresh projector between a language model and a CLIP tower; ``load_model`` reads any finished checkpoint;
``save_checkpoint`` writes one: stock LLaVA when no intervention is on, with this package's code beside it otherwise.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from ..data.conversation import IMAGE_TOKEN, chat_template
from ..data.images import ImagePreprocessor
from .configuration_spatial_llava import SpatialLlavaConfig
from .interventions import Interventions
from .modeling_spatial_llava import SpatialLlavaForConditionalGeneration
from .processing_spatial_llava import SpatialLlavaProcessor

# Exported vocabularies grow to a multiple of this, as in the published HF checkpoints of LLaVA (32000 -> 32064).
VOCABULARY_STEP = 64


class BuildError(ValueError):
    """A model folder that cannot be used; the message names the folder, what was found and the fix."""


AutoConfig.register("spatial_llava", SpatialLlavaConfig)
AutoModelForImageTextToText.register(SpatialLlavaConfig, SpatialLlavaForConditionalGeneration)
AutoProcessor.register(SpatialLlavaConfig, SpatialLlavaProcessor)


# -- parts --------------------------------------------------------------------------------------------------------------


def load_tokenizer(folder: str | Path, model_max_length: int = 2048, padding_side: str = "right") -> Any:
    """The folder's tokenizer, set up so that :mod:`llava_ext.data.conversation` gives LLaVA's ids.

    The padding token is `<unk>`, as in LLaVA. An `<image>` token that an exported checkpoint's tokenizer has is taken out again: in
    training the text `<image>` of a sample without image is ordinary text.

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
    _remove_image_token(tokenizer)
    if tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise BuildError(
            f"{folder}: the tokenizer has no <unk> and its padding token is {tokenizer.pad_token!r}; padding is dropped from texts, so it "
            "must be a token of its own: set pad_token in tokenizer_config.json"
        )
    return tokenizer


def _remove_image_token(tokenizer: Any) -> None:
    """Takes a special `<image>` token out of the tokenizer, in place."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in description["added_tokens"] if token["content"] != IMAGE_TOKEN]
    if len(kept) == len(description["added_tokens"]) or IMAGE_TOKEN in description["model"].get("vocab", {}):
        return
    description["added_tokens"] = kept
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(description))


def with_image_token(tokenizer: Any) -> Any:
    """A copy of the tokenizer in which `<image>` is one special token, after all others."""
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return extended


def image_token_id(tokenizer: Any) -> int:
    """The id that `<image>` has in exported checkpoints: the first that the tokenizer does not use."""
    return int(with_image_token(tokenizer).convert_tokens_to_ids(IMAGE_TOKEN))


def load_image_processor(folder: str | Path) -> Any:
    """The vision tower's image processor (Pillow backend)."""
    try:
        return CLIPImageProcessorPil.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise BuildError(
            f"{folder}: no image processor ({error}); it needs preprocessor_config.json"
        ) from None


def load_tower(folder: str | Path, dtype: torch.dtype | None, attn_implementation: str | None) -> Any:
    """The vision part of a CLIP checkpoint, with every weight found. Raises :class:`BuildError` otherwise."""
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    if config.model_type != "clip_vision_model":
        raise BuildError(f"{folder}: found a {config.model_type} model; a CLIP vision tower is expected")
    tower, info = AutoModel.from_pretrained(
        str(folder),
        config=config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        output_loading_info=True,
    )
    _require_complete(folder, info, unexpected=False)
    return tower


def load_llm(folder: str | Path, dtype: torch.dtype | None, attn_implementation: str | None) -> Any:
    """A causal language model with every weight found. Raises :class:`BuildError` otherwise."""
    model, info = AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=False,
        output_loading_info=True,
    )
    _require_complete(folder, info, unexpected=False)
    return model


def _require_complete(folder: str | Path, info: Mapping[str, Any], unexpected: bool = True) -> None:
    """transformers only prints what was missing; here it is an error."""
    kinds = ["missing_keys", "mismatched_keys", *(["unexpected_keys"] if unexpected else [])]
    for kind in kinds:
        if info[kind]:
            names = sorted(str(name) for name in info[kind])
            raise BuildError(
                f"{folder}: {len(names)} {kind.replace('_', ' ')}, e.g. {', '.join(names[:4])}; the weights do not belong to this "
                "kind of model, or the files are not all there"
            )


# -- build --------------------------------------------------------------------------------------------------------------


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
    """A model from a language model's and a CLIP tower's folder, with a new projector; its tokenizer and image processor.

    The projector is initialised as LLaVA's (PyTorch's own initialisation of linear layers), from torch's current random state. With
    ``normalize_statistics: auto`` the statistics are measured on the language model here and kept in ``model.config``.

    Args:
        vision_feature_select_strategy: `default` drops the CLS token (LLaVA's `patch`), `full` keeps it (`cls_patch`).
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
    grid = vision.config.image_size // vision.config.patch_size
    chosen.validate(grid, vision.config.num_hidden_layers, vision_feature_select_strategy == "full")
    language = load_llm(llm, dtype, attn_implementation)
    chosen = resolve_statistics(chosen, language.get_input_embeddings(), len(tokenizer))
    config_fields |= {
        "projector_type": projector_type,
        "vision_feature_layer": vision_feature_layer,
        "vision_feature_select_strategy": vision_feature_select_strategy,
        "image_token_index": image_token_id(tokenizer),
        "image_mean": list(image_processor.image_mean),
        "image_std": list(image_processor.image_std),
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
    model = _assembled(config, language, vision)
    return model, tokenizer, image_processor


def _assembled(
    config: SpatialLlavaConfig, language: Any, vision: Any
) -> SpatialLlavaForConditionalGeneration:
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


@contextmanager
def without_zero3() -> Any:
    """While it lasts, models are built and saved as without ZeRO-3, which would partition and gather their parameters."""
    from transformers.integrations import deepspeed

    before = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before


def reset_projector(projector: nn.Module) -> None:
    """LLaVA's initialisation: PyTorch's default for linear layers, ones for the normalisation's weight.

    The numbers are drawn on the CPU in float32, so that they depend neither on the device nor on the precision.
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
    """The interventions with ``projector_max_norm`` and ``projector_scale`` filled in, if normalisation is on.

    `auto` sets the clip to the mean Euclidean norm of the language model's token embeddings and the scale to 1: a new projector's
    tokens (whose weight is ones) then all have exactly the mean norm of text tokens. Rows of zeros and rows that the
    tokenizer does not use are left out.
    """
    if not interventions.normalize_projector:
        return interventions
    statistics = interventions.fixed_statistics()
    if statistics is None:
        statistics = (mean_token_norm(embedding, vocabulary), 1.0)
    return interventions.with_statistics(*statistics)


def mean_token_norm(embedding: nn.Module, vocabulary: int) -> float:
    """Mean Euclidean norm of the used rows of an embedding table; also under ZeRO-3, where every rank must call it."""
    weight: Any = embedding.weight
    with _gathered(weight):
        # on the CPU: a GPU adds up in another order
        norms = weight.detach()[:vocabulary].float().cpu().norm(dim=-1)
        norms = norms[norms > 0]
        if not len(norms) or not torch.isfinite(norms).all():
            raise BuildError(
                "normalize_statistics: `auto` found no finite, non-zero token embeddings in the language model"
            )
        return float(norms.double().mean())


def _gathered(parameter: Any) -> Any:
    """A context in which a parameter that ZeRO-3 has partitioned is whole."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


# -- load ---------------------------------------------------------------------------------------------------------------


def load_model(
    folder: str | Path,
    dtype: torch.dtype | None = torch.float32,
    attn_implementation: str | None = None,
    model_max_length: int = 2048,
    llm: str | Path | None = None,
    tower: str | Path | None = None,
) -> tuple[SpatialLlavaForConditionalGeneration, Any, Any]:
    """Model, tokenizer and image processor of a finished checkpoint: ours, stock LLaVA's, or an original LLaVA folder.

    Args:
        llm, tower: for original LLaVA folders: the base model of a stage-1 projector, and the vision tower when the path in its config
            does not exist here.

    Raises:
        BuildError: a folder that is none of these, or incomplete.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise BuildError(f"{folder}: no config.json; a checkpoint folder is expected")
    if _is_original(path):
        from ..checkpoints import original as formats

        return formats.load_original(
            path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            model_max_length=model_max_length,
            llm=llm,
            tower=tower,
        )
    model, info = SpatialLlavaForConditionalGeneration.from_pretrained(
        str(path),
        config=_stored_config(path),
        dtype=dtype,
        attn_implementation=attn_implementation,
        output_loading_info=True,
    )
    _require_complete(folder, info)
    shrink_vocabulary(model)
    return model, load_tokenizer(path, model_max_length), _stored_image_processor(path)


def _read_config(path: Path) -> dict[str, Any]:
    content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _is_original(path: Path) -> bool:
    """Original LLaVA configs name their vision tower and have no nested configs; their model types are many (`llava_llama2d`)."""
    content = _read_config(path)
    return "mm_vision_tower" in content and "text_config" not in content


def _stored_config(path: Path) -> SpatialLlavaConfig:
    """Our configuration for a checkpoint in transformers' format. Raises :class:`BuildError` for another kind of model."""
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
            f"{path}: no image processor ({error}); it needs processor_config.json or preprocessor_config.json"
        ) from None


def shrink_vocabulary(model: SpatialLlavaForConditionalGeneration) -> None:
    """Takes away the rows that :func:`save_checkpoint` added for `<image>`, so that the LLM is again as it was trained."""
    rows = model.config.llm_vocab_size
    if rows is not None and rows < model.config.text_config.vocab_size:
        model.resize_token_embeddings(rows)
    model.config.llm_vocab_size = None


# -- save ---------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    model: SpatialLlavaForConditionalGeneration,
    tokenizer: Any,
    image_processor: Any,
    folder: str | Path,
    prompt_version: str | None = None,
    image_aspect_ratio: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a finished checkpoint that transformers loads.

    Without interventions (and with the usual two-layer projector) it is a stock LLaVA checkpoint and needs no code of ours. Otherwise
    this package's model code is saved beside the weights and loads with ``trust_remote_code=True``. Both get rows for the `<image>`
    token: the mean of the other rows, whose logit is the mean logit and so never the largest.

    Args:
        state_dict: the gathered weights, by their names in memory, when ``model`` holds only a part of them (ZeRO-3, FSDP).
    """
    config = copy.deepcopy(model.config)
    config.prompt_version = prompt_version or config.prompt_version
    config.image_aspect_ratio = image_aspect_ratio or config.image_aspect_ratio
    config.text_config.use_cache = True  # training turns it off
    weights = dict(model.state_dict() if state_dict is None else state_dict)
    extend_vocabulary(config, weights)
    clone = _empty_clone(config)
    clone.load_state_dict(weights, strict=True, assign=True)
    clone.generation_config = copy.deepcopy(model.generation_config)
    processor = make_processor(config, tokenizer, image_processor)
    with _staged(Path(folder)) as staging, _auto_classes(config), without_zero3():
        clone.save_pretrained(str(staging), save_original_format=True)
        processor.save_pretrained(str(staging))


def _empty_clone(config: SpatialLlavaConfig) -> Any:
    """A model of the class that the checkpoint is for, without memory for its weights."""
    with torch.device("meta"), without_zero3():
        if config.is_stock:
            return LlavaForConditionalGeneration(config.to_stock())
        return SpatialLlavaForConditionalGeneration(config)


def extend_vocabulary(config: SpatialLlavaConfig, weights: dict[str, Tensor]) -> None:
    """Adds rows for `<image>` to the embedding table and the head, in place; nothing when its id is inside the vocabulary."""
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
    saved_images = LlavaImageProcessorPil(
        size={"shortest_edge": pixels.size},
        crop_size={"height": pixels.size, "width": pixels.size},
        image_mean=list(pixels.mean),
        image_std=list(pixels.std),
        do_pad=pixels.aspect_ratio == "pad",
    )
    text = with_image_token(tokenizer)
    text.padding_side = "left"  # a checkpoint is for generation, which needs it
    shared: dict[str, Any] = {
        "image_processor": saved_images,
        "tokenizer": text,
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "chat_template": chat_template(config.prompt_version) if config.prompt_version else None,
        "num_additional_image_tokens": 1,
    }
    if config.is_stock:
        return LlavaProcessor(**shared)
    return SpatialLlavaProcessor(**shared, interventions=config.interventions.to_dict())


@contextmanager
def _auto_classes(config: SpatialLlavaConfig) -> Any:
    """While it lasts, saving copies the code of our classes beside the weights (not for stock checkpoints)."""
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
    """Yields a temporary folder inside ``folder``; its files move into place when all are written, config.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f".saving.{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        files = sorted(staging.iterdir(), key=lambda path: path.name == "config.json")
        for path in files:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        for path in files:
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
