"""The command line of ``python -m llava_ext.train``: every flag of LLaVA's own scripts, and ours.

Flags that transformers has renamed or dropped since LLaVA was written are translated (:data:`RENAMED`,
:data:`WITHOUT_EFFECT`); flags that nothing here understands are errors with a suggestion. The intervention
flags come from :class:`llava_ext.model.interventions.Interventions`, so each exists once.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import is_flash_attn_2_available

from ..data.templates import TEMPLATES, described
from ..distributed import rendezvous
from ..errors import TrainingError, say
from ..kernels import ATTENTIONS, FUSIONS, Kernels, layer_interval
from ..model.configuration_spatial_llava import projector_depth
from ..model.interventions import Interventions
from .flag_options import add_interventions, take_interventions
from .llava_flags import FALSE, translate
from .machine import fit_machine, free_cores, tf32_works

# transformers' arguments that would do nothing here, or harm: the only value, and why.
FIXED: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, "LLaVA's loss has none"),
    "auto_find_batch_size": (False, "the batch size is part of the recipe"),
    "train_sampling_strategy": ("random", "use --sampling, --group_by_length or --group_by_modality_length"),
    "enable_jit_checkpoint": (False, "signals are handled already"),
    "save_only_model": (False, "a training could not continue from such a checkpoint"),
    "resume_from_checkpoint": (
        None,
        "the same command continues from the last good checkpoint in --output_dir",
    ),
    "load_best_model_at_end": (False, "there is no evaluation during training"),
    "eval_on_start": (False, "there is no evaluation during training"),
    "push_to_hub": (False, "upload the finished folder with `hf upload`"),
    "use_liger_kernel": (
        False,
        "it would replace the loss and know nothing of this model; use --fusion liger",
    ),
}

# For the metadata of a field: a run that goes on may have another value.
NO_INFLUENCE = {"influence": False}

# The smallest values that mean anything.
LEAST: dict[str, float] = {
    "learning_rate": 0,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "model_max_length": 1,
    "lora_r": 1,
    "watchdog_minutes": 0,
    "watchdog_zero_steps": 0,
}

# Flags that do nothing without another one.
NEEDED: dict[str, str] = dict.fromkeys(
    ("lora_r", "lora_alpha", "lora_dropout", "lora_weight_path", "lora_bias", "lora_merge"), "lora_enable"
)


@dataclass
class ModelArguments:
    """Which models, and how they are joined. Defaults are LLaVA's."""

    model_name_or_path: str = field(
        default="",
        metadata={"help": "LLM: a folder or a hub id (Vicuna, Llama, Mistral, Qwen, ...).", **NO_INFLUENCE},
    )
    vision_tower: str | None = field(
        default=None,
        metadata={"help": "Vision tower (CLIP, SigLIP, DINOv2): a folder or a hub id.", **NO_INFLUENCE},
    )
    version: str = field(default="v1", metadata={"help": f"Prompt template: {described()}."})
    freeze_backbone: bool = field(
        default=False, metadata={"help": "Freeze the LLM except its lm_head, as LLaVA does."}
    )
    tune_mm_mlp_adapter: bool = field(default=False, metadata={"help": "Stage 1: only the projector trains."})
    mm_vision_select_layer: int = field(
        default=-1, metadata={"help": "Vision layer (LLaVA-1.5's scripts: -2)."}
    )
    pretrain_mm_mlp_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Projector to start from: mm_projector.bin, a .safetensors file, or a folder.",
            **NO_INFLUENCE,
        },
    )
    mm_projector_type: str = field(
        default="linear", metadata={"help": "linear or mlpNx_gelu (LLaVA-1.5: mlp2x_gelu)."}
    )
    mm_patch_merge_type: str = field(default="flat", metadata={"help": "flat."})
    mm_vision_select_feature: str = field(
        default="patch",
        metadata={
            "help": "patch, or cls_patch to keep what comes before the patches (class token, registers)."
        },
    )
    attention: str | None = field(
        default=None, metadata={"help": f"{', '.join(ATTENTIONS)} (default: transformers' choice)."}
    )


@dataclass
class DataArguments:
    """Which samples, and how they become batches."""

    data_path: str = field(
        default="", metadata={"help": "LLaVA-format JSON, or a mixture's samples.json.", **NO_INFLUENCE}
    )
    image_folder: str | None = field(
        default=None,
        metadata={"help": "Folder of the JSON's `image` paths (not for mixtures).", **NO_INFLUENCE},
    )
    image_aspect_ratio: str = field(
        default="square", metadata={"help": "square (centre crop) or pad (to a square first)."}
    )
    skip_samples: str = field(
        default="",
        metadata={
            "help": "Leave these records out: ids, or numbers as #12, with commas between.",
            **NO_INFLUENCE,
        },
    )
    token_lengths: str = field(
        default="",
        metadata={
            "help": (
                "Table of a survey of these samples (workflow_scripts.survey): all of them are checked before"
                " the first step, and the largest micro-batch is said."
            ),
            **NO_INFLUENCE,
        },
    )
    pack: bool = field(
        default=False, metadata={"help": "Collate each micro-batch into one row without padding."}
    )
    cache_pixels: int = field(
        default=0,
        metadata={
            "help": "Keep up to this many MiB of pixels (and ids) in memory, per process (0: none).",
            **NO_INFLUENCE,
        },
    )
    supervised_share_bound: float = field(
        default=0.01,
        metadata={
            "help": "Stop when fewer than this share of the tokens carry a label (0: never).",
            **NO_INFLUENCE,
        },
    )
    mismatch_bound: float = field(
        default=0.1,
        metadata={
            "help": (
                "Stop when more than this share of the samples is masked by a tokenization mismatch (1:"
                " never)."
            ),
            **NO_INFLUENCE,
        },
    )
    preflight_samples: int = field(
        default=256,
        metadata={
            "help": "Samples that are encoded before training to check both bounds (0: none).",
            **NO_INFLUENCE,
        },
    )


@dataclass
class LlavaTrainingArguments(TrainingArguments):
    """transformers' arguments with LLaVA's additions and defaults."""

    cache_dir: str | None = field(
        default=None, metadata={"help": "Hub cache for models given by id.", **NO_INFLUENCE}
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that read samples for each training process (default: on a GPU as many as the"
            " cores allow, on the CPU none)."
        },
    )
    optim: str | None = field(
        default=None,
        metadata={
            "help": "Optimizer (default: AdamW; on a GPU its fused form, adamw_torch_fused, on the CPU"
            " adamw_torch)."
        },
    )
    remove_unused_columns: bool = field(default=False)
    report_to: None | str | list[str] = field(  # noqa: RUF036 (the parser of transformers needs this order)
        default="tensorboard",
        metadata={"help": "tensorboard, wandb, trackio, ... or none; metrics.jsonl is always written."},
    )
    freeze_mm_mlp_adapter: bool = field(default=False, metadata={"help": "Freeze the projector."})
    model_max_length: int = field(default=512, metadata={"help": "Tokens after which a sequence is cut."})
    bits: int = field(default=16, metadata={"help": "16; quantised training is not supported."})
    lora_enable: bool = field(
        default=False, metadata={"help": "Train low-rank adapters of the LLM's linear layers."}
    )
    lora_r: int = field(default=64)
    lora_alpha: int = field(default=16)
    lora_dropout: float = field(default=0.05)
    lora_weight_path: str = field(default="", metadata={"help": "Adapter folder to start from."})
    lora_bias: str = field(default="none")
    lora_merge: bool = field(
        default=True, metadata={"help": "Merge the adapters into the final checkpoint.", **NO_INFLUENCE}
    )
    mm_projector_lr: float | None = field(
        default=None, metadata={"help": "The projector's own learning rate."}
    )
    train_vision_tower: bool = field(
        default=False, metadata={"help": "The vision tower trains too, as far as gradients reach it."}
    )
    vision_tower_lr: float | None = field(
        default=None, metadata={"help": "The vision tower's own learning rate (default: --learning_rate)."}
    )
    group_by_modality_length: bool = field(default=False, metadata={"help": "LLaVA's grouping of samples."})
    group_by_length: bool = field(default=False, metadata={"help": "Grouping by length alone."})
    sampling: Literal["random", "sequential"] = field(
        default="random",
        metadata={"help": "Order without grouping: random, or sequential (as the file has it)."},
    )
    loss_normalization: Literal["micro_batch", "token"] = field(
        default="micro_batch",
        metadata={
            "help": (
                "micro_batch: mean of the micro-batches' means, as LLaVA; token: mean over all tokens of the"
                " step."
            )
        },
    )
    fusion: str = field(
        default="none", metadata={"help": f"Fuse what is not a matrix product: {', '.join(FUSIONS)}."}
    )
    checkpoint_layers: str | None = field(
        default=None,
        metadata={
            "help": "Recompute these decoder layers' activations: all, none, N (every Nth), auto.",
            **NO_INFLUENCE,
        },
    )
    watchdog_minutes: float = field(
        default=60.0,
        metadata={"help": "Stop when nothing has gone on for so many minutes (0: never).", **NO_INFLUENCE},
    )
    watchdog_zero_steps: int = field(
        default=20,
        metadata={"help": "Stop when the loss has been zero for so many steps (0: never).", **NO_INFLUENCE},
    )
    meeting_timeout_s: float = field(
        default=600.0,
        metadata={
            "help": "Several processes: stop when one has not come to the start after so many seconds.",
            **NO_INFLUENCE,
        },
    )
    resume: Literal["auto", "never"] = field(
        default="auto",
        metadata={"help": "auto: continue from the last good checkpoint in --output_dir.", **NO_INFLUENCE},
    )

    def __post_init__(self) -> None:
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 0 if self.use_cpu else free_cores()
        if self.optim is None:
            self.optim = "adamw_torch" if self.use_cpu else "adamw_torch_fused"
        super().__post_init__()


@dataclass(frozen=True)
class Arguments:
    """Everything that the command line said."""

    model: ModelArguments
    data: DataArguments
    training: LlavaTrainingArguments
    interventions: Interventions
    notices: tuple[str, ...]


class _Parser(HfArgumentParser):
    def add_argument(self, *names: Any, influence: bool = True, **options: Any) -> Any:
        """argparse's, without what a field's metadata says for others."""
        return super().add_argument(*names, **options)

    def error(self, message: str) -> Any:
        raise TrainingError(f"command line: {message}")


def make_parser() -> HfArgumentParser:
    """The parser of today's flags."""
    parser = _Parser(
        [ModelArguments, DataArguments, LlavaTrainingArguments],
        prog="python -m llava_ext.train",
        description="Trains LLaVA on transformers. Takes the flags of LLaVA's own scripts.",
        formatter_class=argparse.HelpFormatter,
        allow_abbrev=False,
    )
    add_interventions(parser, "interventions (all off: vanilla LLaVA)")
    return parser


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """Reads and checks the command line. Raises :class:`TrainingError` or ``InterventionError`` with the
    fix.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    if "--help" in argv or "-h" in argv:
        parser.print_help()
        raise SystemExit(0)
    known = [
        option[2:]
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    ]
    translated, notices = translate(argv, known, tf32_works())
    translated = fit_machine(translated, notices)
    namespace, extra = parser.parse_known_args(translated)
    if extra:
        raise TrainingError(f"command line: {extra[0]!r} is not the value of any flag")
    interventions = take_interventions(namespace) or Interventions()
    model = _build(ModelArguments, namespace)
    data = _build(DataArguments, namespace)
    _check_before(model, data, namespace)
    # Before anything talks to the other processes, which would only wait for one that never comes.
    rendezvous.wait_for_all(namespace.meeting_timeout_s, on_gpus=not namespace.use_cpu)
    if namespace.deepspeed:
        _prepare_deepspeed(namespace, explicit_clip="--max_grad_norm" in translated)
    training = _build(LlavaTrainingArguments, namespace)
    _adjust(training)
    return Arguments(model, data, training, interventions, tuple(notices))


def _build(kind: type[Any], namespace: argparse.Namespace) -> Any:
    names = {item.name for item in dataclasses.fields(kind) if item.init}
    try:
        return kind(**{name: value for name, value in vars(namespace).items() if name in names})
    except (ValueError, ImportError, OSError) as error:
        raise TrainingError(f"command line: {error}") from error


def _prepare_deepspeed(namespace: argparse.Namespace, explicit_clip: bool) -> None:
    """Clipping as asked for (LLaVA's own files have none), and the rendezvous of a run without a launcher."""
    config = json.loads(Path(namespace.deepspeed).read_text(encoding="utf-8"))
    if explicit_clip:
        config.setdefault("gradient_clipping", "auto")
    namespace.deepspeed = config
    if namespace.use_cpu:
        # DeepSpeed takes a GPU that is there, unless it reads otherwise while it is imported.
        os.environ["DS_ACCELERATOR"] = "cpu"
    if "RANK" not in os.environ:
        # port 0: one that is free at the moment of use
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
        os.environ.update({name: str(value) for name, value in alone.items()})


def _check_before(model: ModelArguments, data: DataArguments, namespace: argparse.Namespace) -> None:
    """Everything that can be refused before a device is touched."""
    for name, value in (
        ("model_name_or_path", model.model_name_or_path),
        ("data_path", data.data_path),
        ("output_dir", namespace.output_dir),
    ):
        if not value:
            raise TrainingError(f"--{name}: missing; it is needed")
    allowed: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "version": (model.version, tuple(TEMPLATES)),
        "image_aspect_ratio": (data.image_aspect_ratio, ("square", "pad")),
        "mm_patch_merge_type": (model.mm_patch_merge_type, ("flat",)),
        "mm_vision_select_feature": (model.mm_vision_select_feature, ("patch", "cls_patch")),
        "bits": (namespace.bits, (16,)),
        "eval_strategy": (str(getattr(namespace.eval_strategy, "value", namespace.eval_strategy)), ("no",)),
        "lora_bias": (namespace.lora_bias, ("none", "all", "lora_only")),
        "attention": (model.attention or "sdpa", ATTENTIONS),
        "fusion": (namespace.fusion, FUSIONS),
    }
    for name, (value, values) in allowed.items():
        if value not in values:
            raise TrainingError(f"--{name}: found {value!r}; allowed: {', '.join(map(str, values))}")
    _check_kernels(model, namespace)
    _check_values(model, namespace)
    for name, (value, reason) in FIXED.items():
        found = getattr(namespace, name)
        if str(found) != str(value) and str(found).lower() not in FALSE:
            raise TrainingError(f"--{name} {found}: not supported: {reason}; leave it out")
    for name, path in (
        ("data_path", data.data_path),
        ("image_folder", data.image_folder),
        ("pretrain_mm_mlp_adapter", model.pretrain_mm_mlp_adapter),
        ("lora_weight_path", namespace.lora_weight_path),
    ):
        if path and not Path(path).exists():
            raise TrainingError(f"--{name} {path}: does not exist")
    grouped = [name for name in ("group_by_length", "group_by_modality_length") if getattr(namespace, name)]
    if len(grouped) == 2 or (grouped and namespace.sampling == "sequential"):
        raise TrainingError(
            f"--{grouped[0]}: contradicts --{grouped[-1] if len(grouped) == 2 else 'sampling sequential'};"
            " give one of them"
        )
    _check_what_trains(model, namespace)


def _check_kernels(model: ModelArguments, namespace: argparse.Namespace) -> None:
    """Kernels that do not go together with this machine, the precision or the engine."""
    given, checkpointing = namespace.checkpoint_layers, bool(namespace.activation_checkpointing)
    try:
        interval = layer_interval(given if given is not None else "all" if checkpointing else "none")
    except ValueError as error:
        raise TrainingError(f"--checkpoint_layers: {error}") from None
    if interval == 0 and checkpointing:
        raise TrainingError(
            "--checkpoint_layers none: contradicts --gradient_checkpointing True; leave one of them out"
        )
    chosen = Kernels(model.attention or "sdpa", namespace.fusion)
    half, gpu = bool(namespace.bf16 or namespace.fp16), not namespace.use_cpu
    for name, sentence in chosen.problems(gpu=gpu, half=half, engine=_engine(namespace)):
        raise TrainingError(f"--{name}: {sentence}")
    if model.attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise TrainingError(
            "--attention: flash_attention_2 needs the package flash-attn, which is missing here; install it,"
            " or use varlen, which needs none"
        )


def _engine(namespace: argparse.Namespace) -> str:
    """What spreads the model, in the words of :class:`Kernels`."""
    if namespace.deepspeed:
        config = json.loads(Path(namespace.deepspeed).read_text(encoding="utf-8"))
        return f"zero{config.get('zero_optimization', {}).get('stage', 0)}"
    return "fsdp" if namespace.fsdp else "none"


def _check_what_trains(model: ModelArguments, namespace: argparse.Namespace) -> None:
    """Flags that contradict each other about what trains, or that say something of what does not."""
    rate = namespace.vision_tower_lr
    if rate is not None and not (namespace.train_vision_tower and rate > 0):
        raise TrainingError(
            f"--vision_tower_lr {rate}: allowed is a number above 0, together with --train_vision_tower True;"
            " leave it out for a tower that does not train, or that trains with --learning_rate"
        )
    rate = namespace.mm_projector_lr
    if rate is not None and (namespace.freeze_mm_mlp_adapter or not rate > 0):
        raise TrainingError(
            f"--mm_projector_lr {rate}: allowed is a number above 0, for a projector that trains; leave it"
            " out with --freeze_mm_mlp_adapter True"
        )
    tuned, frozen = model.tune_mm_mlp_adapter, namespace.freeze_mm_mlp_adapter
    if tuned and frozen and not namespace.train_vision_tower:
        raise TrainingError(
            "--freeze_mm_mlp_adapter: contradicts --tune_mm_mlp_adapter, nothing would train; give one of"
            " them"
        )
    if namespace.lora_enable and tuned:
        raise TrainingError(
            "--lora_enable: contradicts --tune_mm_mlp_adapter, which trains only the projector; give one of"
            " them"
        )
    if namespace.lora_enable and model.freeze_backbone:
        raise TrainingError(
            "--freeze_backbone: does nothing with --lora_enable, whose adapters are all of the LLM that"
            " trains; leave it out"
        )


def _check_values(model: ModelArguments, namespace: argparse.Namespace) -> None:
    """Values out of range, an unknown projector, and flags that would do nothing."""
    for name, least in LEAST.items():
        if not getattr(namespace, name) >= least:
            raise TrainingError(f"--{name} {getattr(namespace, name)}: allowed is a number from {least:g}")
    try:
        projector_depth(model.mm_projector_type)
    except ValueError as error:
        raise TrainingError(f"--mm_projector_type: {str(error).removeprefix('projector_type: ')}") from None
    defaults = {item.name: item.default for item in dataclasses.fields(LlavaTrainingArguments)}
    for name, other in NEEDED.items():
        found = getattr(namespace, name)
        if found != defaults[name] and not getattr(namespace, other):
            raise TrainingError(
                f"--{name} {found}: does nothing without --{other} True; add that or leave it out"
            )


def checkpoint_every(training: LlavaTrainingArguments, interval: int) -> None:
    """Has every ``interval``-th decoder layer recomputed; 0: none."""
    training.activation_checkpointing = training.gradient_checkpointing = bool(interval)
    if interval:
        others = dict(training.activation_checkpointing_kwargs or {})
        training.activation_checkpointing_kwargs = others | {"every_n_layers": interval}


def _adjust(training: LlavaTrainingArguments) -> None:
    """Settings that follow from others, and those that must not hide trouble."""
    interval = layer_interval(training.checkpoint_layers) if training.checkpoint_layers else None
    if interval is not None:  # auto: once the model is there
        checkpoint_every(training, interval)
    training.logging_nan_inf_filter = False
    training.remove_unused_columns = False
    if training.device.type == "cpu":
        training.dataloader_pin_memory = False
    training.accelerator_config.non_blocking = training.dataloader_pin_memory
    if not sys.stderr.isatty():
        training.disable_tqdm = True
    # The model runs all its modules in every batch, so DDP need not look for parameters without gradient.
    if training.ddp_find_unused_parameters is None:
        training.ddp_find_unused_parameters = False
    training._n_gpu = min(training.n_gpu, 1)  # several GPUs are for torchrun, never for DataParallel
    given = training.report_to if isinstance(training.report_to, list) else [training.report_to]
    reports = [name for text in given if text for name in text.split(",") if name != "none"]
    training.report_to = [name for name in reports if name != "tensorboard" and _installed(name)]
    # also in the place of a tracker that is not installed
    training.own_tensorboard = "all" in reports or len(training.report_to) < len(reports)


def _installed(reporter: str) -> bool:
    """Whether a reporting package is there; a training does not fail for want of it."""
    found = importlib.util.find_spec(reporter) if reporter.isidentifier() and reporter != "all" else None
    if reporter == "all" or (found is not None and found.origin is not None):
        return True  # a mere folder of that name, as W&B makes one where it runs, has no origin
    say(f"--report_to {reporter}: the package is not installed; metrics go to metrics.jsonl and TensorBoard")
    return False


def sampling_strategy(training: LlavaTrainingArguments) -> str:
    """The sampler's name for these arguments."""
    if training.group_by_modality_length:
        return "group_by_modality_length"
    return "group_by_length" if training.group_by_length else training.sampling
