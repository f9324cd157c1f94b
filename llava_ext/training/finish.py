"""From a training's weights to the files that a stage leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import files
from ..checkpoints import adapters, keys, original, tensors
from ..checkpoints.stored import save_checkpoint, save_tower
from ..distributed.collectives import barrier
from ..errors import NoVerdict, TrainingError, say
from ..model.folders import load_image_processor, load_tokenizer
from . import claim, states
from .identity import skipped_history
from .lora import is_adapted, merged_state, save_adapters
from .precision import half_precision
from .trainer import LlavaTrainer

if TYPE_CHECKING:
    from .arguments import Arguments

ADAPTERS = "adapters"


def conclude(
    trainer: LlavaTrainer, arguments: Arguments, folders: dict[str, Path], interrupted: bool
) -> None:
    """Writes the final weights and ``train_result.json``; after a signal only the latter. Every rank must
    call.
    """
    output_dir, step = Path(arguments.training.output_dir), trainer.state.global_step
    first = trainer.is_world_process_zero()
    if first:
        claim.check_claim(output_dir)
    if interrupted:
        if first:
            states.write_result(output_dir, "interrupted", step)
        say(f"interrupted after step {step} of {trainer.state.max_steps}, saved; the same command continues")
        return
    _check_learned(trainer)
    state = trainer.gathered_state()
    if first:
        folder = output_dir / f"{states.STAGING}final"
        shutil.rmtree(folder, ignore_errors=True)
        write_final(trainer, state, arguments, folders, folder)
        _write_history(trainer, output_dir)
        digests, sizes = states.publish(folder, output_dir)
        facts = {"files": digests, "bytes": sizes, "metrics": _summary(trainer)}
        facts |= skipped_history(output_dir)
        states.write_result(output_dir, "finished", step, **facts)
        say(f"finished after step {step}: {output_dir}")
    barrier()


def _check_learned(trainer: LlavaTrainer) -> None:
    """Raises TrainingError when no token of the whole training carried a label."""
    logged = sum(row.get("supervised_tokens", 0) for row in trainer.state.log_history)
    if not logged + trainer.reports.take_counts()["supervised_tokens"]:
        raise TrainingError(
            f"not one token of the {trainer.state.global_step} steps carried a label, so nothing was learned"
            " and no weights are written; the last batch was\n"
            + "\n".join(trainer.last_samples())
            + "\nCheck --version, --model_max_length and the answers of the data (python -m"
            " llava_ext.statistics)"
        )


def _write_history(trainer: LlavaTrainer, output_dir: Path) -> None:
    """transformers' history of the steps, beside the files of the result: it holds times, which no digest
    may hold.
    """
    temporary = output_dir / f"{states.STAGING}trainer_state.json"
    trainer.state.save_to_json(str(temporary))
    temporary.replace(output_dir / "trainer_state.json")


def _summary(trainer: LlavaTrainer) -> dict[str, Any]:
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    tail = losses[-max(1, len(losses) // 20) :]
    return {
        "final_loss": losses[-1] if losses else None,
        "mean_loss_of_last_twentieth": sum(tail) / len(tail) if tail else None,
        "batches_without_labels": trainer.unsupervised_batches,
    }


def write_final(
    trainer: LlavaTrainer,
    state: dict[str, torch.Tensor],
    arguments: Arguments,
    folders: dict[str, Path],
    folder: Path,
) -> None:
    """The stage's result, written to ``folder`` and read back.

    Stage 1: ``mm_projector.bin``, ``mm_projector.safetensors`` and ``config.json`` as LLaVA's, and the folder
    ``vision_tower`` if that was trained; stage 2: a HF checkpoint, and the folder ``adapters``, as LLaVA's
    LoRA leaves it, where they are to be kept.
    """
    folder.mkdir(parents=True)
    model = trainer.plain_model
    keeps_adapters = is_adapted(model) and not arguments.training.lora_merge
    if is_adapted(model):
        if keeps_adapters:
            base, alone = arguments.model.model_name_or_path, not original.is_llava(folders["llm"])
            save_adapters(model, state, folder / ADAPTERS, base, alone)
        state = merged_state(model, state)
        model = model.get_base_model()
    half = half_precision(arguments.training)
    if half is not None:
        state = {
            name: tensor.to(half) if tensor.is_floating_point() else tensor for name, tensor in state.items()
        }
    state = {name: tensor.detach().cpu() for name, tensor in state.items()}
    # Off while training; a finished model generates with it.
    model.config.text_config.use_cache = True
    vars(model.config).pop("use_cache", None)
    if keeps_adapters:
        _write_projector(model, state, arguments, folders, folder / ADAPTERS)
        projector = tensors.read_tensors(folder / ADAPTERS / "mm_projector.bin")
        torch.save(
            {adapters.WRAPPED + name: tensor for name, tensor in projector.items()},
            folder / ADAPTERS / tensors.NON_LORA,
        )
    if arguments.model.tune_mm_mlp_adapter:
        _write_projector(model, state, arguments, folders, folder)
    else:
        tokenizer = load_tokenizer(folders["llm"], arguments.training.model_max_length)
        processor = load_image_processor(folders["vision_tower"])
        save_checkpoint(
            model,
            tokenizer,
            processor,
            folder,
            prompt_version=arguments.model.version,
            image_aspect_ratio=arguments.data.image_aspect_ratio,
            state_dict=state,
        )
        original.keep_sentencepiece(original.find_sentencepiece(folders["llm"]), folder)
    _read_back(folder)


def _write_projector(
    model: Any, state: dict[str, torch.Tensor], arguments: Arguments, folders: dict[str, Path], folder: Path
) -> None:
    from safetensors.torch import save_file

    projector = keys.projector_to_original(keys.projector_of(state), model.config.interventions)
    projector = {name: tensor.contiguous() for name, tensor in projector.items()}
    torch.save(projector, folder / "mm_projector.bin")
    save_file(projector, folder / "mm_projector.safetensors", metadata={"format": "pt"})
    settings = original_settings(arguments)
    if arguments.training.train_vision_tower:
        tower = {name.removeprefix(keys.TOWER): t for name, t in state.items() if name.startswith(keys.TOWER)}
        processor = load_image_processor(folders["vision_tower"])
        save_tower(model.model.vision_tower, tower, processor, folder / original.TOWER_FOLDER)
        place = Path(arguments.training.output_dir) / (ADAPTERS if folder.name == ADAPTERS else "")
        settings["mm_vision_tower"] = str(place / original.TOWER_FOLDER)
    described = original.config_to_original(
        json.loads(model.config.text_config.to_json_string(use_diff=False)),
        json.loads(model.config.vision_config.to_json_string(use_diff=False)),
        model.config.interventions,
        settings,
    )
    files.write_json(folder / "config.json", described)


def original_settings(arguments: Arguments) -> dict[str, Any]:
    """LLaVA's config fields that come from the command line."""
    model, training = arguments.model, arguments.training
    return {
        "mm_vision_tower": model.vision_tower,
        "mm_projector_type": model.mm_projector_type,
        "mm_vision_select_layer": model.mm_vision_select_layer,
        "mm_vision_select_feature": model.mm_vision_select_feature,
        "mm_projector_lr": training.mm_projector_lr,
        "mm_vision_tower_lr": training.vision_tower_lr,
        "image_aspect_ratio": arguments.data.image_aspect_ratio,
        "tokenizer_model_max_length": training.model_max_length,
        "tune_mm_mlp_adapter": model.tune_mm_mlp_adapter,
        "freeze_mm_mlp_adapter": training.freeze_mm_mlp_adapter,
        "_name_or_path": model.model_name_or_path,
    }


def _read_back(folder: Path) -> None:
    """Proves that what was written can be read: every header, and every name that an index lists."""
    for path in folder.rglob("*.safetensors"):
        try:
            shapes = tensors.tensor_shapes(path)
        except Exception as error:
            raise NoVerdict(f"{path}: was written but can't be read: {error}") from error
        empty = [name for name, shape in shapes.items() if 0 in shape]
        if not shapes or empty:
            raise NoVerdict(
                f"{path}: was written but {f'{empty[:3]} hold nothing' if empty else 'holds no tensors'}"
            )
    index = files.read_json(folder / "model.safetensors.index.json")
    if index:
        for shard in set(index["weight_map"].values()):
            listed = {name for name, place in index["weight_map"].items() if place == shard}
            missing = listed - tensors.tensor_shapes(folder / shard).keys()
            if missing:
                raise NoVerdict(f"{folder / shard}: lacks {sorted(missing)[:3]}")
