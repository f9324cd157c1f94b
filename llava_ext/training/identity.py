"""What determines a training's result, by content; a run continues only with the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.training_args import OptimizerNames

from .. import files
from ..data.skipping import numbered
from ..errors import TrainingError, say
from ..files import read_json, write_json
from .states import RESULT, VERDICT, checkpoints

if TYPE_CHECKING:
    from ..data.samples import SampleStore
    from .arguments import Arguments


IDENTITY = "run_identity.json"
# The samples that were left out, by the step after which that began: part of what the result is, but a
# training that has met a record which can't be used goes on without it.
SKIPPED = "skipped"


def folder_digest(folder: Path) -> str:
    """A digest of a model folder that is cheap at any size: JSON whole; of other files size, head and
    tail.
    """
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith(".") or path.suffix in (".md", ".txt"):
            continue
        with path.open("rb") as stream:
            piece = stream.read(1 << 20)
            size = path.stat().st_size
            if size > 1 << 21:
                stream.seek(-(1 << 20), os.SEEK_END)
                piece += stream.read()
        whole.update(f"{path.name}\0{size}\0".encode() + hashlib.sha256(piece).digest())
    return whole.hexdigest()


def check_identity(
    output_dir: Path, identity: dict[str, Any], rounding: frozenset[str] = frozenset()
) -> None:
    """Refuses to continue a run with another configuration; records the identity of a new one.

    A changed value of ``rounding`` is said and accepted.

    Raises:
        TrainingError: names each other key whose value differs from the recorded one.
    """
    path = output_dir / IDENTITY
    recorded = read_json(path)
    if isinstance(recorded, dict) and _has_begun(output_dir):
        changed = {
            key: f"{key}: {recorded.get(key)!r} when it was started, now {identity.get(key)!r}"
            for key in sorted((recorded.keys() | identity.keys()) - {SKIPPED})
            if _said(recorded.get(key)) != _said(identity.get(key))
        }
        if not changed.keys() <= rounding:
            raise TrainingError(
                f"--output_dir {output_dir}: holds a training with another configuration:\n  "
                + "\n  ".join(changed.values())
                + "\nChoose another --output_dir, or undo the change, or delete the folder to start over."
            )
        for line in changed.values():
            say(f"{line}: the same steps, rounded otherwise from here on")
        identity = identity | ({SKIPPED: recorded[SKIPPED]} if SKIPPED in recorded else {})
    write_json(path, identity)


def note_skipped(output_dir: Path, records: list[dict[str, Any]], step: int) -> None:
    """Records which samples are left out from the step after ``step`` on, beside what was left out before."""
    path = output_dir / IDENTITY
    recorded = read_json(path) or {}
    history = [entry for entry in recorded.get(SKIPPED, []) if entry["after_step"] < step]
    if records != (history[-1]["records"] if history else []):
        history.append({"after_step": step, "records": records})
    if history != recorded.get(SKIPPED, []):
        write_json(path, {name: value for name, value in recorded.items() if name != SKIPPED} | kept(history))
    if records:
        numbers = numbered(record["record"] - 1 for record in records)
        say(f"after step {step} {len(records)} records are left out: {numbers}")


def kept(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The history under its name; nothing where nothing was ever left out."""
    return {SKIPPED: history} if history else {}


def skipped_history(output_dir: Path) -> dict[str, Any]:
    """What a training has left out, for its result: see :func:`kept`."""
    return kept((read_json(output_dir / IDENTITY) or {}).get(SKIPPED, []))


def check_finished(output_dir: Path, result: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Raises TrainingError when a finished training left out other samples than it would have to now."""
    history = result.get(SKIPPED, [])
    before = history[-1]["records"] if history else []
    if before != records:
        numbers = numbered(record["record"] - 1 for record in before)
        raise TrainingError(
            f'--skip_samples: {output_dir} holds a finished training, which left out "{numbers}"; give that,'
            " or another --output_dir"
        )


def _has_begun(output_dir: Path) -> bool:
    """Whether something was computed that another configuration must not continue."""
    result = read_json(output_dir / RESULT) or {}
    return bool(checkpoints(output_dir)) or result.get("status") not in (None, VERDICT)


def _said(value: Any) -> Any:
    """A value as it is compared: a switch that is off, or a choice of none, equals one that did not exist
    yet.
    """
    return None if value is False or value == "none" else value


# transformers' arguments that do not determine the result: where things lie, what is logged, how work is
# spread over processes. Our own say so themselves, in their fields.
WITHOUT_INFLUENCE = frozenset(
    [
        "output_dir",
        "logging_strategy",
        "logging_first_step",
        "logging_steps",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "save_on_each_node",
        "save_only_model",
        "report_to",
        "run_name",
        "project",
        "disable_tqdm",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        "dataloader_in_order",
        "local_rank",
        "ddp_timeout",
        "ddp_backend",
        "ddp_bucket_cap_mb",
        "ddp_find_unused_parameters",
        "ddp_broadcast_buffers",
        "ddp_static_graph",
        "skip_memory_metrics",
        "push_to_hub",
        "hub_model_id",
        "hub_strategy",
        "hub_token",
        "hub_private_repo",
        "hub_always_push",
        "hub_revision",
        "debug",
        "resume_from_checkpoint",
        "ignore_data_skip",
        "per_device_eval_batch_size",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "deepspeed",
        "fsdp",
        "fsdp_config",
        "use_cpu",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "accelerator_config",
        "parallelism_config",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "torch_empty_cache_steps",
    ]
)


# How the same steps are computed: what helps against too little memory may change on the way, and is said.
ROUNDING = frozenset(["micro_batch_size", "attn_implementation", "fusion", "pack", "tf32"])

# Two forms of one formula, equal within rounding. A training that goes on keeps the form it began with, which
# its saved state holds.
SAME_OPTIMIZER = {OptimizerNames.ADAMW_TORCH_FUSED: OptimizerNames.ADAMW_TORCH}


def identity(arguments: Arguments, store: SampleStore, folders: dict[str, Path]) -> dict[str, Any]:
    """Everything that determines the result, by content rather than by path."""
    training = arguments.training
    values: dict[str, Any] = {}
    for group in (arguments.model, arguments.data, training):
        for item in dataclasses.fields(group):
            if item.name in WITHOUT_INFLUENCE or not item.metadata.get("influence", True):
                continue
            value = getattr(group, item.name, None)
            values[item.name] = value if isinstance(value, (bool, int, float, type(None))) else str(value)
    values |= {f"interventions.{name}": value for name, value in arguments.interventions.to_dict().items()}
    values["optim"] = str(SAME_OPTIMIZER.get(training.optim, training.optim))
    values["attn_implementation"] = values.pop("attention")  # under the name of trainings that have begun
    values["micro_batch_size"] = training.per_device_train_batch_size
    values["global_batch_size"] = (
        training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    )
    values["samples"] = store.digest
    values |= {f"{name}_content": folder_digest(folder) for name, folder in folders.items()}
    adapter = arguments.model.pretrain_mm_mlp_adapter
    if adapter:
        path = Path(adapter)
        values["projector_content"] = folder_digest(path) if path.is_dir() else files.sha256(path)
    return json.loads(json.dumps(values, default=str))
