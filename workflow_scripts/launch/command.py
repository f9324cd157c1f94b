"""From a training's specification to the command that computes it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workflow_scripts.config.compute import ComputeSpec
from workflow_scripts.config.stages import StageSpec
from workflow_scripts.io import UserError, digest
from workflow_scripts.stages import STAGES

TRAIN = "llava_ext.train"
# LLaVA's file names where it has one: its zero3_offload.json moves the parameters too.
DEEPSPEED_FILES = {
    ("zero2", "none"): "zero2.json",
    ("zero2", "optimizer"): "zero2_offload.json",
    ("zero3", "none"): "zero3.json",
    ("zero3", "optimizer"): "zero3_offload_optimizer.json",
    ("zero3", "parameters"): "zero3_offload.json",
}
# What trackers file the runs under, unless the user's environment says otherwise (WANDB_PROJECT).
PROJECT = "llava"


@dataclass(frozen=True)
class Inputs:
    """The files that a training reads."""

    samples: Path
    llm: Path
    vision_tower: Path
    projector: Path | None = None
    token_lengths: Path | None = None


@dataclass(frozen=True)
class Nodes:
    """The machines of a job; the first one answers at ``address``."""

    names: Sequence[str] = ("localhost",)
    address: str = "127.0.0.1"
    port: int = 29500
    job: str = field(default="", compare=False)


def accumulation(stage: StageSpec, compute: ComputeSpec) -> int:
    """Micro-batches in one optimizer step of one process."""
    together = compute.processes * int(compute.per_device_batch_size)
    if stage.global_batch_size % together:
        raise UserError(
            f"global_batch_size {stage.global_batch_size} can't be divided by {together} ({compute.processes}"
            f" processes x {compute.per_device_batch_size} samples); change per_device_batch_size"
        )
    return stage.global_batch_size // together


def training_flags(spec: Mapping[str, Any], inputs: Inputs, output_dir: Path) -> list[str]:
    """The command line of ``python -m llava_ext.train``, in the names of LLaVA's own scripts."""
    stage, compute = StageSpec.model_validate(spec["recipe"]), ComputeSpec.model_validate(spec["compute"])
    values: dict[str, Any] = {
        "model_name_or_path": inputs.llm,
        "vision_tower": inputs.vision_tower,
        "data_path": inputs.samples,
        "token_lengths": inputs.token_lengths,
        "skip_samples": ",".join(spec.get("skip_samples", ())) or None,
        "output_dir": output_dir,
        **_model_flags(spec, stage, inputs),
        **_recipe_flags(stage),
        **_tracking_flags(spec, stage, output_dir),
        **_compute_flags(stage, compute),
        **{key: _text(value) for key, value in spec["interventions"].items()},
    }
    flags: list[str] = []
    for key, value in values.items():
        if value is not None:
            items = value if isinstance(value, list | tuple) else [value]
            flags += [f"--{key}", *(str(item) for item in items)]
    return flags


def _text(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, list | tuple) else value


def _model_flags(spec: Mapping[str, Any], stage: StageSpec, inputs: Inputs) -> dict[str, Any]:
    model = spec["model"]
    return {
        "version": stage.prompt_version,
        "mm_projector_type": model["projector_type"],
        "mm_vision_select_layer": model["vision_feature_layer"],
        "mm_vision_select_feature": model["vision_feature_select"],
        "tune_mm_mlp_adapter": None if STAGES[spec["stage"]].trains_llm else True,
        "freeze_mm_mlp_adapter": None if stage.train_projector else True,
        "train_vision_tower": stage.train_vision_tower or None,
        "pretrain_mm_mlp_adapter": inputs.projector,
    }


def _recipe_flags(stage: StageSpec) -> dict[str, Any]:
    lora = stage.lora
    return {
        "image_aspect_ratio": stage.image_aspect_ratio,
        "num_train_epochs": stage.epochs,
        "max_steps": stage.max_steps,
        "learning_rate": stage.learning_rate,
        "mm_projector_lr": stage.mm_projector_lr,
        "vision_tower_lr": stage.vision_tower_learning_rate,
        "weight_decay": stage.weight_decay,
        "warmup_ratio": stage.warmup_ratio,
        "lr_scheduler_type": stage.scheduler,
        "lr_scheduler_kwargs": (
            None if stage.min_lr_rate is None else json.dumps({"min_lr_rate": stage.min_lr_rate})
        ),
        "adam_beta1": stage.adam_beta1,
        "adam_beta2": stage.adam_beta2,
        "max_grad_norm": stage.max_grad_norm,
        "model_max_length": stage.model_max_length,
        "group_by_modality_length": stage.group_by_modality_length,
        "loss_normalization": stage.loss_normalization,
        "seed": stage.seed,
        "data_seed": stage.seed,
        "save_strategy": "steps",
        "save_steps": stage.save_steps,
        "save_total_limit": stage.save_total_limit,
        "logging_steps": stage.logging_steps,
        "mismatch_bound": stage.max_mismatch_share,
        "supervised_share_bound": stage.min_supervised_share,
        "report_to": list(stage.report_to) or "none",
        **({} if lora is None else {"lora_enable": True, **{f"lora_{key}": value for key, value in lora}}),
    }


def _tracking_flags(spec: Mapping[str, Any], stage: StageSpec, output_dir: Path) -> dict[str, Any]:
    """Names in W&B and trackio; trackio goes on in the run of the same name, so other data make another
    name.
    """
    if not {"wandb", "trackio"} & set(stage.report_to):
        return {}
    return {"project": PROJECT, "run_name": f"{spec['stage']}-{spec['run']}-{output_dir.name}"}


def _compute_flags(stage: StageSpec, compute: ComputeSpec) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": compute.per_device_batch_size,
        "gradient_accumulation_steps": accumulation(stage, compute),
        "bf16": True if compute.precision == "bf16" else None,
        "fp16": True if compute.precision == "fp16" else None,
        "tf32": True if compute.tf32 else None,
        "use_cpu": (
            not compute.gpus_per_node
        ),  # False: stops where no GPU can be used, instead of computing for days
        **compute.kernels.model_dump(),
        "pack": True if compute.packing else None,
        "cache_pixels": compute.cache_pixels_mb or None,
        "dataloader_num_workers": compute.dataloader_workers,
        "watchdog_minutes": compute.stall_min,
        "ddp_timeout": compute.distributed_timeout_s,
        "deepspeed": deepspeed_file(compute),
        "fsdp": True if compute.parallel == "fsdp" else None,
    }


def deepspeed_file(compute: ComputeSpec) -> str | None:
    """The DeepSpeed JSON: the user's own, or the name of one that comes with ``llava_ext``."""
    if compute.deepspeed_config:
        return str(Path(compute.deepspeed_config).expanduser().absolute())
    if compute.parallel not in ("zero2", "zero3"):
        return None
    return DEEPSPEED_FILES[compute.parallel, compute.offload]


def training_command(
    flags: Sequence[str], compute: ComputeSpec, nodes: Nodes, python: str = sys.executable
) -> list[str]:
    """Plain Python for one process, torchrun for several, srun and torchrun for several machines."""
    if compute.processes == 1:
        return [python, "-m", TRAIN, *flags]
    torchrun = [python, "-m", "torch.distributed.run", f"--nproc-per-node={compute.local_processes}"]
    # torchrun would kill its workers 30 s after a SIGTERM, in the middle of their last save.
    torchrun += ["--signals-to-handle=SIGINT", "--max-restarts=0"]
    if compute.nodes == 1:
        return [*torchrun, "--standalone", "-m", TRAIN, *flags]
    torchrun += [f"--nnodes={compute.nodes}", f"--master-addr={nodes.address}", f"--master-port={nodes.port}"]
    inner = (
        f"trap '' TERM; exec {shlex.join(torchrun)} --node-rank=$SLURM_NODEID -m {TRAIN} {shlex.join(flags)}"
    )
    return [*srun(compute.nodes, compute.cpus), "bash", "-c", inner]


def srun(nodes: int, cpus: int) -> list[str]:
    """One task on each machine of the job. Every flag is given: little is inherited from the job."""
    return [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={cpus}",
        "--kill-on-bad-exit=1",
    ]


def tracking_environment(spec: Mapping[str, Any], state: Path, started: float) -> dict[str, str]:
    """What W&B is told where the user's environment says nothing: all attempts are one run, written beside
    the training.

    The id changes with ``started``, the first attempt's time: W&B takes no id again whose run was deleted.
    """
    if "wandb" not in spec["recipe"]["report_to"]:
        return {}
    return {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(state.absolute()),
        "WANDB_PROJECT": PROJECT,
        "WANDB_RUN_ID": digest({"state": state.name, "started": started}, 16),
        "WANDB_RESUME": "allow",
        "WANDB_RUN_GROUP": spec["run"],
        "WANDB_JOB_TYPE": spec["stage"],
    }


def training_environment(base: Mapping[str, str], compute: ComputeSpec) -> dict[str, str]:
    """Variables of a training: one thread pool a process, no network, time-outs that end a hang."""
    threads = str(max(1, compute.cpus // compute.local_processes))
    wanted = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    usual = {}
    if not compute.gpus_per_node:
        wanted["DS_ACCELERATOR"] = "cpu"
    elif "PYTORCH_CUDA_ALLOC_CONF" not in base:  # batches of ever other widths leave holes
        usual["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return {**usual, **base, **wanted}
