"""From arguments to open data, a claimed output folder and a trainer that is ready to run."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import set_seed

from .. import files, statistics
from ..checkpoints import original, tensors
from ..checkpoints.generation import exported_generation
from ..checkpoints.stored import load_model, make_processor
from ..data.assembly import Collator
from ..data.dataset import EncodedSamples, RecordError, TrainingCollator
from ..data.images import ImagePreprocessor, decode
from ..data.samples import open_samples
from ..data.skipping import GuardedSamples, identified
from ..distributed import memory
from ..distributed.gather import count, whole
from ..errors import NoVerdict, TrainingError, say
from ..kernels import layer_interval
from ..model.attention import attend_by_segments, check_family, while_loading
from ..model.build import build_model, reset_projector
from ..model.folders import image_config, load_image_processor, load_tokenizer, tower_config
from ..model.language_models import text_model_type, text_settings
from ..model.modeling_spatial_llava import VARLEN
from ..model.parts import check_language_model, resolve_model
from ..model.towers import check_select_feature
from . import claim, states
from .arguments import checkpoint_every
from .identity import ROUNDING, check_finished, check_identity, identity
from .kernels import SWISH, check_fusion, check_liger, fuse
from .lora import add_adapters, is_adapted
from .optimizer import PROJECTOR, TOWER, component, freeze
from .precision import cast_frozen, half_precision, load_dtype
from .recompute import choose_interval
from .token_lengths import MicroBatch, counts_by_source, largest_micro_batch, read_token_lengths
from .trainer import LlavaTrainer
from .vision_tower import train_tower

if TYPE_CHECKING:
    from ..data.samples import SampleStore
    from .arguments import Arguments


def open_inputs(arguments: Arguments) -> tuple[SampleStore, dict[str, Path]]:
    """The samples, and the folders of the language model and the vision tower.

    Raises:
        TrainingError: names the flag of what can't be opened.
    """
    model, cache = arguments.model, arguments.training.cache_dir
    folders = {"llm": resolve_model(model.model_name_or_path, "model_name_or_path", cache)}
    if not model.vision_tower:
        raise TrainingError("--vision_tower: missing; give the folder or hub id of a vision tower")
    folders["vision_tower"] = resolve_model(model.vision_tower, "vision_tower", cache)
    store = open_samples(arguments.data.data_path, arguments.data.image_folder, tolerant=True)
    if not len(store):
        raise TrainingError(f"--data_path {arguments.data.data_path}: holds no samples")
    if store.mended:
        kinds = ", ".join(f"{count} {kind}" for kind, count in store.mended.items())
        say(f"--data_path {arguments.data.data_path}: records read in another form: {kinds} (docs/data.md)")
    return store, folders


def open_output(
    arguments: Arguments, store: SampleStore, folders: dict[str, Path], skipped: Sequence[int] = ()
) -> dict[str, Any] | None:
    """Claims the output folder and checks what is in it; gives the result of a training that is finished."""
    output_dir = Path(arguments.training.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    claim.claim(output_dir)
    if arguments.training.resume == "never" and any(output_dir.glob("checkpoint-*")):
        raise TrainingError(f"--resume never: {output_dir} holds checkpoints; delete it to start over")
    check_identity(output_dir, identity(arguments, store, folders), ROUNDING)
    finished = states.finished(output_dir)
    if finished:
        check_finished(output_dir, finished, identified(store, skipped))
        return finished
    states.clear_staging(output_dir)
    (output_dir / states.RESULT).unlink(missing_ok=True)
    return None


def make_trainer(
    arguments: Arguments,
    store: SampleStore,
    folders: dict[str, Path],
    checkpoint: Path | None = None,
    skipped: Sequence[int] = (),
) -> LlavaTrainer:
    """Everything that a run needs, checked before the first step. ``checkpoint``: what it is going to
    continue from; ``skipped``: the samples that it leaves out.
    """
    training = arguments.training
    _check_families(arguments, folders)
    arguments = with_known_statistics(arguments, checkpoint)
    tokenizer = load_tokenizer(folders["llm"], training.model_max_length)
    samples = GuardedSamples(make_samples(arguments, store, folders, tokenizer), skipped)
    lengths = _lengths(samples, arguments)
    surveyed = _surveyed(samples, arguments)
    model, image_processor = _make_model(arguments, folders)
    fuse(model.get_base_model() if is_adapted(model) else model, training.fusion)
    _preflight(model, tokenizer, image_processor, arguments)
    collator = Collator.for_model(
        model.config, tokenizer, model_max_length=training.model_max_length, packed=arguments.data.pack
    )
    trainer = LlavaTrainer(
        model=model,
        args=training,
        train_dataset=samples,
        data_collator=TrainingCollator(collator),
        lengths=lengths,
        describe=samples.samples.describe,
        mm_projector_lr=training.mm_projector_lr,
        pixel_table=_preprocessor(arguments, folders).table(),
    )
    tokens = trainer.largest_tokens
    if surveyed is not None:
        trainer.largest_tokens = tokens = _say_lengths(surveyed, trainer, arguments)
    if training.checkpoint_layers == "auto":
        interval, why = choose_interval(model, training, tokens)
        checkpoint_every(training, interval)
        say(why)
    return trainer


def _check_families(arguments: Arguments, folders: dict[str, Path]) -> None:
    """Refuses towers and language models that are not registered, and a compression that keeps every token of
    this tower, before anything is loaded.
    """
    keeps_all, flags = arguments.model.mm_vision_select_feature == "cls_patch", arguments.interventions
    check_select_feature(tower_config(folders["vision_tower"]), keeps_all)
    side = image_config(folders["vision_tower"], flags, keeps_all).grid_side
    if flags.final_spatial_size == side**2 and not flags.published_behaviour:
        raise TrainingError(
            f"--final_spatial_size {side**2}: as many tokens as the tower's grid has are no compression;"
            " choose fewer, or leave --compression_after_projection out"
        )
    check_language_model(folders["llm"])
    _check_layers(arguments.training.checkpoint_layers, text_settings(folders["llm"]))
    if arguments.model.attention == VARLEN:
        check_family(text_model_type(folders["llm"]))
    check_fusion(arguments.training.fusion, gpu=not arguments.training.use_cpu)
    if arguments.training.fusion == "liger":
        activation = text_settings(folders["llm"]).get("hidden_act", SWISH[0])
        check_liger(text_model_type(folders["llm"]), activation)


def _check_layers(chosen: str | None, language: Mapping[str, Any]) -> None:
    """Refuses to recompute every Nth of fewer than N layers, which would be the first one alone."""
    interval, layers = layer_interval(chosen or "none") or 0, int(language.get("num_hidden_layers", 0))
    if 0 < layers < interval:
        raise TrainingError(
            f"--checkpoint_layers {interval}: this language model has {layers} layers; allowed: all, none,"
            f" auto, or a number N from 1 to {layers}"
        )


def with_known_statistics(arguments: Arguments, checkpoint: Path | None) -> Arguments:
    """`normalize_statistics: auto` is measured once: a run that goes on, and stage 2, keep the numbers of the
    beginning.

    Measured again in another precision or on another device they would differ in the last digits.
    """
    mine, adapter = arguments.interventions, arguments.model.pretrain_mm_mlp_adapter
    if not mine.normalize_projector or mine.fixed_statistics() is not None:
        return arguments
    projector = Path(adapter) if adapter else None
    for folder in (checkpoint, projector if projector is None or projector.is_dir() else projector.parent):
        known = original.measured_statistics(files.read_json(folder / "config.json")) if folder else None
        if known is not None:
            return dataclasses.replace(arguments, interventions=mine.with_statistics(*known))
    return arguments


@dataclass(frozen=True)
class ReadImage:
    """From an image file's bytes to levels of 8 bits, (3, height, width), which the trainer normalises on its
    device. A class, so that it can be sent to dataset workers.
    """

    preprocess: ImagePreprocessor

    def __call__(self, data: bytes, tolerant: bool) -> torch.Tensor:
        return self.preprocess.uint8(decode(data, tolerant))


def _preprocessor(arguments: Arguments, folders: dict[str, Path]) -> ImagePreprocessor:
    processor = load_image_processor(folders["vision_tower"])
    return ImagePreprocessor.from_processor(processor, arguments.data.image_aspect_ratio)


def make_samples(
    arguments: Arguments, store: SampleStore, folders: dict[str, Path], tokenizer: Any
) -> EncodedSamples:
    """The training set, with LLaVA's preprocessing for this vision tower."""
    return EncodedSamples(
        store,
        tokenizer,
        arguments.model.version,
        arguments.training.model_max_length,
        ReadImage(_preprocessor(arguments, folders)),
        arguments.data.cache_pixels,
    )


def _lengths(guarded: GuardedSamples, arguments: Arguments) -> np.ndarray:
    """The samples' lengths, which decide their order; those that are left out keep their place in it."""
    lengths, samples = np.array(guarded.samples.store.lengths), guarded.samples
    skipped = list(guarded.skipped)
    lengths[skipped] = np.where(lengths[skipped] == 0, 1, lengths[skipped])
    if arguments.training.group_by_modality_length and (lengths == 0).any():
        index = int((lengths == 0).argmax())
        raise TrainingError(
            f"--group_by_modality_length: {samples.describe(index)} has no words, so it can't be grouped."
            f" {guarded.advice([index])}"
        )
    return lengths


def _surveyed(guarded: GuardedSamples, arguments: Arguments) -> np.ndarray | None:
    """The survey's table, if one was given. Stops when the samples would teach nothing: all of them, with a
    table, else some that are encoded here.
    """
    data, samples = arguments.data, guarded.samples
    rows = read_token_lengths(data.token_lengths, len(samples)) if data.token_lengths else None
    if rows is None and not data.preflight_samples:
        return None
    found = _encode_some(guarded, data.preflight_samples) if rows is None else counts_by_source(rows, samples)
    whole = statistics.total(found)
    say(
        f"{len(samples)} samples; of {whole.samples} looked at, {whole.supervised_share:.1%} of the tokens"
        f" are supervised, {whole.mismatches} are masked by a tokenization mismatch"
    )
    statistics.check_bounds(found, data.supervised_share_bound, data.mismatch_bound)
    return rows


def _encode_some(guarded: GuardedSamples, number: int) -> dict[str, statistics.Counts]:
    samples = guarded.samples
    chosen = statistics.spread(len(samples), number)
    try:
        return statistics.survey(samples, (index for index in chosen if index not in guarded.skipped))
    except RecordError as error:
        raise TrainingError(f"{error}\n{guarded.advice([error.index])}") from error


def _say_lengths(rows: np.ndarray, trainer: LlavaTrainer, arguments: Arguments) -> int:
    """Says how much an epoch is, and which micro-batch needs the most memory; gives the tokens of that."""
    training = arguments.training
    order = trainer.order_of_samples()
    largest = largest_micro_batch(rows, order, training.per_device_train_batch_size, arguments.data.pack)
    if not training.process_index:
        _say_largest(rows, largest)
    return largest.tokens


def _say_largest(rows: np.ndarray, largest: MicroBatch) -> None:
    say(
        f"{int(rows['tokens'].sum(dtype=np.int64))} tokens in an epoch; the largest micro-batch of the first"
        f" one, number {largest.place + 1}, has {len(largest.samples)} samples and {largest.tokens} tokens"
    )


def _make_model(arguments: Arguments, folders: dict[str, Path]) -> tuple[Any, Any]:
    """The model, with the projector to start from, frozen as the stage wants it."""
    model_args, training = arguments.model, arguments.training
    make = _from_checkpoint if original.is_llava(folders["llm"]) else _from_parts
    model, image_processor = make(arguments, folders)
    if model_args.pretrain_mm_mlp_adapter:
        load_projector(model, Path(model_args.pretrain_mm_mlp_adapter))
    model.config.text_config.use_cache = False
    if model_args.attention == VARLEN:
        attend_by_segments(model.model.language_model)
    if training.lora_enable:
        model = add_adapters(
            model,
            rank=training.lora_r,
            alpha=training.lora_alpha,
            dropout=training.lora_dropout,
            bias=training.lora_bias,
            weights=training.lora_weight_path,
            train_projector=not training.freeze_mm_mlp_adapter,
            in_float32=not training.deepspeed,
            autocast=half_precision(training) is not None and not (training.deepspeed or training.fsdp),
        )
    else:
        freeze(
            model,
            tune_mm_mlp_adapter=model_args.tune_mm_mlp_adapter,
            freeze_mm_mlp_adapter=training.freeze_mm_mlp_adapter,
            freeze_backbone=model_args.freeze_backbone,
        )
    if training.train_vision_tower:
        train_tower(model)
    cast_frozen(model, training)
    return model, image_processor


def _from_parts(arguments: Arguments, folders: dict[str, Path]) -> tuple[Any, Any]:
    """A language model and a vision tower, joined by a new projector."""
    model_args, training = arguments.model, arguments.training
    model, _, image_processor = build_model(
        folders["llm"],
        folders["vision_tower"],
        arguments.interventions,
        projector_type=model_args.mm_projector_type,
        vision_feature_layer=model_args.mm_vision_select_layer,
        vision_feature_select_strategy=(
            "full" if model_args.mm_vision_select_feature == "cls_patch" else "default"
        ),
        attn_implementation=while_loading(model_args.attention),
        dtype=load_dtype(training),
        model_max_length=training.model_max_length,
        image_aspect_ratio=arguments.data.image_aspect_ratio,
        prompt_version=model_args.version,
    )
    # The seed alone decides a new projector's weights, however many random numbers loading the parts has
    # used.
    set_seed(training.seed)
    reset_projector(model.model.multi_modal_projector)
    return model, image_processor


def _from_checkpoint(arguments: Arguments, folders: dict[str, Path]) -> tuple[Any, Any]:
    """A whole LLaVA checkpoint; refuses one with other interventions or another projector than the command
    line says.
    """
    model_args, training, folder = arguments.model, arguments.training, folders["llm"]
    model, _, image_processor = load_model(
        folder,
        dtype=load_dtype(training),
        attn_implementation=while_loading(model_args.attention),
        model_max_length=training.model_max_length,
        tower=folders["vision_tower"] if original.is_original(folder) else None,
    )
    mine, theirs = arguments.interventions, model.config.interventions
    known = original.measured_statistics(theirs.to_dict())
    if mine.normalize_projector and mine.fixed_statistics() is None and known is not None:
        mine = mine.with_statistics(*known)
    original.check_interventions(mine, theirs, str(folder))
    flags = {name: getattr(model_args, name) for name in original.vision_features(model.config)}
    original.check_features(flags, original.vision_features(model.config), model.config, str(folder))
    if model.config.projector_type != model_args.mm_projector_type:
        raise TrainingError(
            f"--mm_projector_type {model_args.mm_projector_type}: {folder} has {model.config.projector_type};"
            " give that"
        )
    model.config.image_aspect_ratio = arguments.data.image_aspect_ratio
    model.config.prompt_version = model_args.version
    return model.train(), image_processor


def load_projector(model: Any, path: Path) -> None:
    """Puts a saved projector into the model; refuses one of other interventions, naming the keys that
    differ.
    """
    projector = tensors.read_projector(path)
    folder = path if path.is_dir() else path.parent
    _check_interventions(model.config, folder / "config.json", path)
    module = model.model.multi_modal_projector
    with whole(*module.parameters(), write=True):
        _fill(module, projector, path)


def _fill(module: torch.nn.Module, projector: Mapping[str, torch.Tensor], path: Path) -> None:
    expected = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
    tensors.check_projector(projector, expected, str(path))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(projector[name])


def _check_interventions(config: Any, stored: Path, what: Path) -> None:
    """Compares with the config beside a projector, if there is one that says anything."""
    described = files.read_json(stored)
    if not isinstance(described, dict):
        return
    original.check_tower(described, config.vision_config, what)
    original.check_features(original.vision_features(config), described, config, str(what))
    if not ("mm_vision_tower" in described or original.OWN_KEY in described):
        return
    theirs = original.interventions_from_original(described, config.grid_side)
    original.check_interventions(config.interventions, theirs, str(what))


def _preflight(model: Any, tokenizer: Any, image_processor: Any, arguments: Arguments) -> None:
    """Everything that would make the last save fail, found before the first step."""
    # Vicuna's temperature and top_p without do_sample could not be saved; a checkpoint does not have them.
    generation = exported_generation(model.generation_config, [])
    output_dir = Path(arguments.training.output_dir)
    try:
        generation.validate(strict=True)
        with tempfile.TemporaryDirectory(prefix=f"{states.STAGING}test-", dir=output_dir) as folder:
            generation.save_pretrained(folder)
            model.config.save_pretrained(folder)
            make_processor(model.config, tokenizer, image_processor).save_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(
            f"{arguments.model.model_name_or_path}: a checkpoint of this model could not be saved: {error}"
        ) from error
    _check_disk(model, arguments)
    memory.check(model, arguments.training)


def _check_disk(model: Any, arguments: Arguments) -> None:
    """Refuses to start when not even one checkpoint and the final weights fit on the disk."""
    output_dir = Path(arguments.training.output_dir)
    needed, free = bytes_to_write(model, arguments), shutil.disk_usage(output_dir).free
    if free < needed:
        saved = (
            "the final weights need"
            if _saves_nothing(arguments)
            else "one checkpoint and the final weights need"
        )
        raise NoVerdict(
            f"--output_dir {output_dir}: {free / 2**30:.1f} GiB are free, {saved} about {needed / 2**30:.1f}"
            " GiB; make room or choose another folder"
        )


def bytes_to_write(model: Any, arguments: Arguments) -> int:
    """The least that a training writes: one checkpoint, unless none is asked for, and the final weights in
    their precision.
    """
    training = arguments.training
    named = list(model.named_parameters())
    layout = memory.layout(training)
    trained = count(parameter for _, parameter in named if parameter.requires_grad)
    checkpoint = (layout.weight + layout.master + layout.moments) * trained
    if arguments.model.tune_mm_mlp_adapter:
        parts = {PROJECTOR: 2} | (
            {TOWER: 1} if training.train_vision_tower else {}
        )  # the projector in two formats
        final = sum(parts.get(component(name), 0) * count([parameter]) for name, parameter in named)
    else:
        final = count(parameter for _, parameter in named)
    half = half_precision(training)
    return (0 if _saves_nothing(arguments) else checkpoint) + final * (4 if half is None else half.itemsize)


def _saves_nothing(arguments: Arguments) -> bool:
    return str(getattr(arguments.training.save_strategy, "value", arguments.training.save_strategy)) == "no"
