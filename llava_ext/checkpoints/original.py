"""The original LLaVA layout: its key names, its config fields, its files; both ways, without loss.

    original                                              in memory
    model.embed_tokens..., model.layers..., model.norm    model.language_model....
    lm_head.weight                                        lm_head.weight
    model.mm_projector.<wrappers>.<0, 2, ...>.weight      model.multi_modal_projector.linear_<1, 2,
    ...>.weight model.mm_projector.<wrappers>.norm.weight             model.multi_modal_projector.norm.weight
    model.vision_tower.vision_tower.vision_model....      model.vision_tower....

The published intervention code wraps the projector, outermost first: ``proj`` with compression, ``projector``
with coordinates, ``projector`` with normalisation. Reading accepts any wrapping; writing makes the published
one.

LLaVA's code knows CLIP towers and Llama and Mistral. Other families have no whole checkpoint in this layout
(forks that have one disagree about which of the tower's layers they keep), so none is written; a stage-1
projector and its config are, for this package alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..data.image_token import image_token_id, marks_once, name_tokenizer
from ..errors import TrainingError
from ..files import read_json, write_json
from ..model import folders, parts
from ..model.interventions import (
    DEFAULT_LAYERS,
    FLAGS,
    PUBLISHED_GRID_SIDE,
    PUBLISHED_SPARSITY,
    VICUNA_7B_MAX_NORM,
    VICUNA_7B_SCALE,
    Interventions,
)
from ..model.language_models import LANGUAGE_MODELS, language_model, original_text_type
from ..model.poolings import DEFAULT_POOLING
from ..model.towers import TOWERS, registered_tower
from ..patches import without_zero3
from . import adapters
from .keys import ORIGINAL_PROJECTOR, TOWER, TRAINED_TOWER, state_from_original, state_to_original
from .tensors import WEIGHT_FILES, check_projector, read_folder, read_projector, save_sharded

OWN_KEY = "spatial_llava"
# Beside the projector of a stage 1 that trained the tower too; LLaVA's layout has no place for it.
TOWER_FOLDER = "vision_tower"


# ---- files ----------------------------------------------------------------------------------------------


# ---- projector ------------------------------------------------------------------------------------------


# ---- whole models ---------------------------------------------------------------------------------------


# ---- configuration --------------------------------------------------------------------------------------


def loads_with(interventions: Interventions, text_type: str, tower_type: str) -> list[str]:
    """Which code computes the same model from the original layout; ``*_type``: transformers' model types."""
    names = ["llava_ext"]
    if unknown_to_llava(text_type, tower_type):
        return names
    if interventions.is_vanilla:
        return ["LLaVA", *names]
    published = text_type == "llama" and not published_problems(interventions)
    return ["the published intervention code", *names] if published else names


def unknown_to_llava(text_type: str, tower_type: str) -> list[str]:
    """Why the original layout cannot hold a whole model of these families, as sentences; empty when it
    can.
    """
    found = []
    if registered_tower(tower_type).original_prefix is None:
        with_prefix = [entry.title for entry in TOWERS.values() if entry.original_prefix]
        found.append(
            f"LLaVA's code has no {registered_tower(tower_type).title} tower, only {', '.join(with_prefix)}"
        )
    if language_model(text_type).original is None:
        known = [entry.title for entry in LANGUAGE_MODELS.values() if entry.original]
        found.append(f"LLaVA's code has no {text_type} language model, only {', '.join(known)}")
    return found


def original_class(text_type: str, two_dimensional: bool) -> dict[str, Any]:
    """``model_type`` and ``architectures`` of an original ``config.json``."""
    kind, architecture = language_model(text_type).original or (
        f"llava_{text_type}",
        f"Llava{text_type.title()}ForCausalLM",
    )
    return {"model_type": kind + "2d" * two_dimensional, "architectures": [architecture]}


def published_problems(interventions: Interventions) -> list[str]:
    """Why the published intervention code could not compute this model; empty when it can."""
    found = []
    if interventions.normalize_projector and interventions.fixed_statistics() != (
        VICUNA_7B_MAX_NORM,
        VICUNA_7B_SCALE,
    ):
        found.append("normalisation constants other than 1.22 and 0.83")
    if interventions.use_multilayer_features and interventions.multilayer_layers != DEFAULT_LAYERS:
        found.append(f"vision layers other than {DEFAULT_LAYERS}")
    if interventions.compression_after_projection and interventions.pooling != DEFAULT_POOLING:
        found.append(f"pooling other than {DEFAULT_POOLING}")
    if not interventions.published_behaviour:
        if interventions.twoD_vision_embedding:
            found.append("two-dimensional positions of each image")
        if interventions.interleave and interventions.sparsity != PUBLISHED_SPARSITY:
            found.append(f"coordinates every {interventions.sparsity} tokens")
        if interventions.add_spatial_coordinates and (
            interventions.use_multilayer_features or interventions.compression_after_projection
        ):
            found.append("coordinates together with several layers or compression")
    return found


def config_to_original(
    text_config: Mapping[str, Any],
    vision_config: Mapping[str, Any],
    interventions: Interventions,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The ``config.json`` of the original layout.

    Args:
        text_config: the LLM's own config.
        vision_config: the vision tower's config.
        interventions: the flags, under the published names; what those can't say is in ``spatial_llava``.
        settings: LLaVA's fields that the model does not know (``mm_vision_tower``, ``image_aspect_ratio``,
            ...).
    """
    fields = {
        key: value
        for key, value in text_config.items()
        if key not in ("model_type", "architectures", "dtype")
    }
    fields |= {
        **original_class(text_config["model_type"], interventions.twoD_vision_embedding),
        "mm_hidden_size": vision_config["hidden_size"],
        "mm_patch_merge_type": "flat",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "use_mm_proj": True,
        "tokenizer_padding_side": "right",
    }
    fields |= {key: value for key, value in settings.items() if value is not None or key == "mm_projector_lr"}
    if "rope_theta" not in fields and isinstance(text_config.get("rope_parameters"), dict):
        fields["rope_theta"] = text_config["rope_parameters"].get("rope_theta", 10000.0)
        fields["rope_scaling"] = None
    if vision_config.get(TRAINED_TOWER):
        fields[TRAINED_TOWER] = True
    if not interventions.is_vanilla:
        fields |= _published_fields(interventions, vision_config)
    fields[OWN_KEY] = {
        "interventions": interventions.to_dict(),
        "loads_with": loads_with(interventions, text_config["model_type"], vision_config["model_type"]),
        "vision_config": dict(vision_config),
    }
    return fields


def _published_fields(interventions: Interventions, vision_config: Mapping[str, Any]) -> dict[str, Any]:
    # Only a CLIP tower's model is the published code's, whose pictures have the tower's own size.
    grid = int(vision_config["image_size"]) // int(vision_config["patch_size"])
    fields: dict[str, Any] = {
        "add_registers": False,
        "num_registers": 4,
        "num_vision_tokens": grid * grid,
        "normalize_projector": interventions.normalize_projector,
        "use_multilayer_features": interventions.use_multilayer_features,
        "add_spatial_coordinates": interventions.add_spatial_coordinates,
        "compression_after_projection": interventions.compression_after_projection,
        # The published code takes the side; 16 is its default.
        "final_spatial_size": (
            interventions.final_side(grid) if interventions.compression_after_projection else 16
        ),
    }
    if interventions.twoD_vision_embedding:
        fields["twoD_vision_embedding"] = True
    if interventions.interleave:
        fields |= {"interleave": True, "interleave_sparsity": interventions.sparsity}
    return fields


def measured_statistics(described: Any) -> tuple[float, float] | None:
    """The numbers (max_norm, scale) that `auto` has found, from a ``config.json`` of either layout; None
    where it says others.
    """
    if not isinstance(described, dict):
        return None
    own = described.get(OWN_KEY)
    values = own.get("interventions") if isinstance(own, dict) else described
    if not isinstance(values, dict) or values.get("normalize_statistics") != "auto":
        return None
    max_norm, scale = values.get("projector_max_norm"), values.get("projector_scale")
    return None if max_norm is None or scale is None else (float(max_norm), float(scale))


def interventions_from_original(config: Mapping[str, Any], grid_side: int) -> Interventions:
    """The interventions of an original ``config.json``; what we wrote there ourselves comes first.

    The published ``final_spatial_size`` is a side. Where the described meaning gives the same model (the side
    divides the grid; coordinates on a grid of 24) it is translated, else ``published_behaviour`` is set.
    """
    own = config.get(OWN_KEY)
    if isinstance(own, dict) and isinstance(own.get("interventions"), dict):
        return Interventions.from_mapping(own["interventions"], ignore_unknown=True)
    flags = {name: True for name in FLAGS if config.get(name) is True}
    published = bool(flags.get("twoD_vision_embedding")) or (
        bool(flags.get("interleave")) and grid_side != PUBLISHED_GRID_SIDE
    )
    values: dict[str, Any] = dict(flags)
    if flags.get("compression_after_projection"):
        side = int(config.get("final_spatial_size", 16))
        published = published or grid_side % side != 0
        values["final_spatial_size"] = side if published else side * side
    if published:
        values["published_behaviour"] = True
    if flags.get("interleave") and not published:
        values["interleave_sparsity"] = PUBLISHED_SPARSITY
    return Interventions.from_mapping(values)


def is_original(folder: Path) -> bool:
    """Whether a folder holds an original LLaVA checkpoint (whole, or a projector with its config)."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "mm_vision_tower" in config


def is_llava(folder: Path) -> bool:
    """Whether a model folder is a whole LLaVA checkpoint, of any layout, rather than a language model."""
    described = read_json(folder / "config.json") or {}
    return described.get("model_type") in ("llava", "spatial_llava") or "mm_vision_tower" in described


def check_interventions(mine: Interventions, theirs: Interventions, what: str) -> None:
    """Refuses weights that were trained with other interventions, naming each key that differs."""
    differing = mine.differences(theirs)
    if differing:
        raise TrainingError(
            f"{what}: was trained with other interventions (this model against that one):\n  "
            + "\n  ".join(differing)
            + "\nGive the same flags, or train stage 1 with these."
        )


def vision_features(config: Any) -> dict[str, Any]:
    """What a model takes of its vision tower, in LLaVA's words."""
    return {
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "cls_patch" if config.keeps_cls else "patch",
    }


def check_features(mine: Mapping[str, Any], theirs: Mapping[str, Any], config: Any, what: str) -> None:
    """Refuses weights that were trained on another layer of the tower, or with another choice of its tokens.

    Args:
        mine, theirs: LLaVA's fields, as :func:`vision_features` gives them; what is absent is not compared.
        config: of the model. The layer does not count where the interventions name several.
    """
    states = int(config.vision_config.num_hidden_layers) + 1
    for name in vision_features(config):
        layer = name == "mm_vision_select_layer"
        if name not in theirs or (layer and config.interventions.feature_layers):
            continue
        pair = [int(side[name]) % states if layer else side[name] for side in (mine, theirs)]
        if pair[0] != pair[1]:
            raise TrainingError(
                f"--{name} {mine[name]}: {what} was trained with {theirs[name]}; give that, or train stage 1"
                f" with {mine[name]}"
            )


def tower_trained(described: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` of any layout says that the vision tower was trained (also in LLaVA-NeXT's
    way).
    """
    nested = described.get("vision_config")
    return bool(
        described.get(TRAINED_TOWER)
        or (isinstance(nested, dict) and nested.get(TRAINED_TOWER))
        or "mm_vision_tower" in str(described.get("mm_tunable_parts") or "").split(",")
    )


def check_tower(described: Mapping[str, Any], vision_config: Any, what: Path) -> None:
    """Refuses a tower as it was published for a projector that was trained together with a tower of its own.

    Raises:
        TrainingError: names the tower to give instead.
    """
    if tower_trained(described) and not getattr(vision_config, TRAINED_TOWER, False):
        beside = (what if what.is_dir() else what.parent) / TOWER_FOLDER
        raise TrainingError(
            f"{what}: was trained together with its vision tower, and the given one is another; give "
            + (str(beside) if beside.is_dir() else "the folder with the tower's trained weights")
            + " as the vision tower"
        )


# ---- loading --------------------------------------------------------------------------------------------


def load_original(
    folder: str | Path,
    dtype: torch.dtype | None = torch.float32,
    attn_implementation: str | None = None,
    model_max_length: int = 2048,
    llm: str | Path | None = None,
    tower: str | Path | None = None,
) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor of an original LLaVA folder: a whole checkpoint, or a projector
    for a base LLM, with or without adapters.

    Args:
        folder: with ``config.json`` and either all weights or a projector, beside which LLaVA's LoRA leaves
            adapters.
        llm: the base LLM of a projector; default: what the config names, if it is a folder.
        tower: the vision tower; default: what the config names.

    Raises:
        TrainingError: something is missing; the message says which argument gives it.
    """

    from ..model.folders import picture_fields

    path = Path(folder)
    described = json.loads((path / "config.json").read_text(encoding="utf-8"))
    beside = path / TOWER_FOLDER
    named = beside if tower is None and beside.is_dir() else tower
    vision_folder = find_model(described.get("mm_vision_tower"), named, path, "vision tower", "--tower")
    whole = any((path / name).is_file() for name in WEIGHT_FILES)
    if whole and tower_trained(described):
        vision = _stored_tower(path, vision_folder, dtype, attn_implementation)
    else:
        vision = parts.load_tower(vision_folder, dtype, attn_implementation)
        check_tower(described, vision.config, path)
    fields = picture_fields(vision.config, folders.load_image_processor(vision_folder))
    grid = (fields["tower_image_size"] or vision.config.image_size) // vision.config.patch_size
    projector = read_projector(path)
    if whole:
        text_folder = path
        language = _load_language_model(path, described, dtype, attn_implementation)
    else:
        text_folder = find_model(described.get("_name_or_path"), llm, path, "base LLM", "--llm")
        language = parts.load_llm(text_folder, dtype, attn_implementation)
        if adapters.is_adapter_folder(path):
            language = adapters.merge_adapters(language, path)
    tokenizer = folders.load_tokenizer(text_folder, model_max_length)
    interventions = interventions_from_original(described, grid)
    fields |= _own_fields(described)
    model = _join(language, vision, interventions, fields, tokenizer)
    module = model.model.multi_modal_projector
    shapes = {name: list(value.shape) for name, value in module.named_parameters()}
    check_projector(projector, shapes, str(path))
    module.load_state_dict(projector)
    module.to(language.dtype)
    return model, tokenizer, folders.load_image_processor(vision_folder)


def _stored_tower(
    folder: Path, named: Path, dtype: torch.dtype | None, attn_implementation: str | None
) -> Any:
    """The trained tower inside a whole checkpoint; of the ``named`` one only its shape is taken."""
    found = state_from_original(read_folder(folder))
    weights = {
        name.removeprefix(TOWER): tensor.to(dtype) if isinstance(dtype, torch.dtype) else tensor
        for name, tensor in found.items()
        if name.startswith(TOWER)
    }
    with without_zero3():
        vision = parts.load_tower(named, dtype, attn_implementation)
    expected = vision.state_dict()
    wrong = sorted(
        name
        for name in expected.keys() | weights.keys()
        if name not in expected or name not in weights or expected[name].shape != weights[name].shape
    )
    if wrong:
        raise TrainingError(
            f"{folder}: its config.json says that the vision tower was trained, and the weights stored there"
            f" do not fit {named}, e.g. {', '.join(wrong[:3])}; give the tower that it was trained from"
        )
    vision.load_state_dict(weights, assign=True)
    setattr(vision.config, TRAINED_TOWER, True)
    return vision


def _own_fields(described: Mapping[str, Any]) -> dict[str, Any]:
    """Our config's fields from those of an original ``config.json``."""
    keeps_cls = described.get("mm_vision_select_feature") == "cls_patch"
    return {
        "projector_type": described.get("mm_projector_type", "linear"),
        "vision_feature_layer": int(described.get("mm_vision_select_layer", -2)),
        "vision_feature_select_strategy": "full" if keeps_cls else "default",
        "image_aspect_ratio": described.get("image_aspect_ratio"),
        "prompt_version": "v1",
    }


def _join(
    language: Any,
    vision: Any,
    interventions: Interventions,
    fields: Mapping[str, Any],
    tokenizer: Any,
) -> Any:
    """The model around a loaded LLM and tower, with a projector that is still to be filled."""
    from ..model import build
    from ..model.configuration_spatial_llava import SpatialLlavaConfig

    chosen = build.resolve_statistics(interventions, language.get_input_embeddings(), len(tokenizer))
    config = SpatialLlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=image_token_id(tokenizer),
        tie_word_embeddings=language.config.tie_word_embeddings,
        **chosen.to_dict(),
        **fields,
    )
    return build.assembled(config, language, vision)


def _load_language_model(
    folder: Path, described: Mapping[str, Any], dtype: torch.dtype | None, attn_implementation: str | None
) -> Any:
    """The LLM inside a whole original checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = original_text_type(str(described.get("model_type", "")))
    if kind is None:
        allowed = " and ".join(entry.original[0] for entry in LANGUAGE_MODELS.values() if entry.original)
        raise TrainingError(f"{folder}: model_type {described.get('model_type')!r}: allowed are {allowed}")
    config = AutoConfig.for_model(kind, **_text_fields(described, AutoConfig.for_model(kind).to_dict()))
    model, info = AutoModelForCausalLM.from_pretrained(
        str(folder),
        config=config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=False,
        output_loading_info=True,
    )
    parts.require_complete(folder, info, unexpected=False)
    return model


def _text_fields(described: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The LLM's own fields of an original ``config.json``, with rotary settings as they are written today."""
    fields = {
        key: value
        for key, value in described.items()
        if key in known and key not in ("model_type", "architectures")
    }
    if "rope_parameters" not in fields:
        scaling = dict(described.get("rope_scaling") or {})
        kind = scaling.pop("type", None) or scaling.pop("rope_type", None) or "default"
        fields["rope_parameters"] = {
            "rope_type": kind,
            "rope_theta": described.get("rope_theta", 10000.0),
            **scaling,
        }
    return fields


def find_model(named: Any, given: str | Path | None, beside: Path, what: str, flag: str) -> Path:
    """A model folder: the one given, the one named (also relative to a parent of ``beside``), or the hub's
    snapshot.
    """
    if given is not None:
        if not Path(given).is_dir() and str(given).count("/") != 1:
            raise TrainingError(f"{flag} {given}: no such folder")
        named = str(given)
    if not named:
        raise TrainingError(f"{beside}: its config.json does not name its {what}; give {flag}")
    for root in (Path(), *beside.resolve().parents):
        if (root / str(named) / "config.json").is_file():
            return root / str(named)
    from ..model.parts import resolve_model

    try:
        return resolve_model(str(named), flag.lstrip("-"), None)
    except TrainingError as error:
        raise TrainingError(
            f"{beside}: its {what} is {named!r}, which is not here; give {flag} ({error})"
        ) from error


# ---- exporting ------------------------------------------------------------------------------------------


def export_original(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    settings: Mapping[str, Any],
    projector_only: bool = False,
    sentencepiece: Path | None = None,
) -> None:
    """Writes a model in the original layout.

    Args:
        model: one of ours, whole, as :func:`llava_ext.checkpoints.stored.load_model` gives it.
        settings: LLaVA's config fields that a model does not know, at least ``mm_vision_tower``.
        projector_only: ``mm_projector.bin`` and ``config.json``, for LLaVA's ``model_base`` loading.
        sentencepiece: the LLM's ``tokenizer.model``, which LLaVA's loader needs and today's tokenizers no
            longer write.

    Raises:
        TrainingError: a whole model of a family that LLaVA's code does not know.
    """
    unknown = unknown_to_llava(model.config.text_config.model_type, model.config.vision_config.model_type)
    if unknown and not projector_only:
        raise TrainingError(
            f"{folder}: the original LLaVA layout can't hold this model: {'; '.join(unknown)}. Use the HF"
            " layout (--to hf); --projector_only writes the projector alone, for this package"
        )
    target = Path(folder)
    config = model.config
    if projector_only and getattr(config.vision_config, TRAINED_TOWER, False):
        raise TrainingError(
            "--projector_only: the vision tower of this model was trained too, and would be left out; write"
            " the whole model"
        )
    target.mkdir(parents=True, exist_ok=True)
    known = _known_settings(model, tokenizer, projector_only)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    tensors = state_to_original(state, config.interventions)
    if projector_only:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(ORIGINAL_PROJECTOR)}
        torch.save(tensors, target / "mm_projector.bin")
        save_file(tensors, target / "mm_projector.safetensors", metadata={"format": "pt"})
    else:
        save_sharded(tensors, target)
        tokenizer.save_pretrained(str(target))
        keep_sentencepiece(sentencepiece, target)
        if sentencepiece is not None or marks_once(tokenizer):
            name_tokenizer(target, tokenizer, "LlamaTokenizer")
        model.generation_config.save_pretrained(str(target))
    described = config_to_original(
        json.loads(config.text_config.to_json_string(use_diff=False)),
        json.loads(config.vision_config.to_json_string(use_diff=False)),
        config.interventions,
        known | dict(settings),
    )
    write_json(target / "config.json", described)


def find_sentencepiece(*folders: str | Path | None) -> Path | None:
    """The first ``tokenizer.model`` in these folders."""
    places = (Path(folder) / "tokenizer.model" for folder in folders if folder)
    return next((path for path in places if path.is_file()), None)


def keep_sentencepiece(model: Path | None, folder: Path) -> None:
    """Copies ``tokenizer.model`` beside a saved tokenizer, and says how it is to be read: without the legacy
    splitting.

    transformers 4 reads this file (LLaVA asks for the slow tokenizer) and would use the legacy rules by
    default.
    """
    if model is None:
        return
    shutil.copyfile(model, folder / "tokenizer.model")
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {"add_bos_token": True, "add_eos_token": False} | content | {"legacy": False})


def _known_settings(model: Any, tokenizer: Any, projector_only: bool) -> dict[str, Any]:
    """LLaVA's config fields that a model does know."""
    config = model.config
    return {
        "mm_projector_type": config.projector_type,
        **vision_features(config),
        "image_aspect_ratio": config.image_aspect_ratio,
        "mm_projector_lr": None,
        "tune_mm_mlp_adapter": projector_only,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_model_max_length": tokenizer.model_max_length,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
    }
