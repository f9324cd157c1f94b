"""LLaVA's own flags as today's: renamed, without effect, refused."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from ..errors import TrainingError

TRUE, FALSE = ("true", "1", "yes", "t", "y"), ("false", "0", "no", "f", "n")


# LLaVA's (transformers 4.37's) name -> today's.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "attn_implementation": "attention",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "include_tokens_per_second": "include_num_input_tokens_seen",
    "unfreeze_mm_vision_tower": "train_vision_tower",
    "mm_vision_tower_lr": "vision_tower_lr",
}

# What LLaVA-NeXT's --mm_tunable_parts may list.
TUNABLE_PARTS = ("mm_vision_tower", "mm_mlp_adapter", "mm_language_model")


# Accepted, and why nothing happens.
WITHOUT_EFFECT = {
    "lazy_preprocess": "samples are always encoded when they are needed",
    "is_multimodal": "the data say whether a sample has an image",
    "mpt_attn_impl": "only for MPT models",
    "double_quant": "only with --bits 4 or 8, which are not supported",
    "quant_type": "only with --bits 4 or 8, which are not supported",
    "save_safetensors": "weights are always safetensors (stage 1 writes mm_projector.bin as well)",
    "overwrite_output_dir": "a run continues by itself; delete the folder to start over",
    "logging_dir": "TensorBoard files are in <output_dir>/tensorboard",
    "num_vision_tokens": "counted from the vision tower",
    "past_index": "never used in training a causal LM",
    "half_precision_backend": "there is one backend today",
    "fp16_backend": "there is one backend today",
    "fp16_opt_level": "belonged to Apex",
    "jit_mode_eval": "there is no evaluation during training",
    "use_ipex": "no longer exists",
    "use_mps_device": "devices are found by themselves",
    "use_legacy_prediction_loop": "there is no evaluation during training",
    "include_inputs_for_metrics": "there is no evaluation during training",
    "ray_scope": "there is no hyper-parameter search",
    "torchdynamo": "use --torch_compile",
    "dispatch_batches": "every rank reads its own samples",
    "split_batches": "every rank reads its own samples",
    "mp_parameters": "belonged to SageMaker",
    "tpu_num_cores": "TPUs are not supported",
    "tpu_metrics_debug": "TPUs are not supported",
    "fsdp_min_num_params": "use --fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "use --fsdp_config",
    "push_to_hub_organization": "use --hub_model_id organization/name",
    "length_column_name": "lengths come from the samples",
    "num_registers": "the published code appends registers and cuts them off again",
}


# Accepted when off; the reason for refusing them when on.
REFUSED = {
    "mm_use_im_start_end": "image start and end tokens belong to LLaVA before 1.5",
    "mm_use_im_patch_token": "the image patch token belongs to LLaVA before 1.5",
    "adafactor": "use --optim adafactor",
    "rearrange_image_features": "the published code accepts this flag and ignores it",
    "add_registers": "the published code appends registers and cuts them off again",
}


def split_flags(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """``["--a", "1", "--b=2"]`` -> ``[("a", ["1"]), ("b", ["2"])]``. Dashes inside a name become
    underscores.
    """
    pairs: list[tuple[str, list[str]]] = []
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            pairs.append((name.replace("-", "_"), [value] if equals else []))
        elif not pairs:
            raise TrainingError(
                f"command line: {token!r} stands before any flag; flags look like --name value"
            )
        else:
            pairs[-1][1].append(token)
    return pairs


def is_on(values: Sequence[str]) -> bool:
    """Whether a switch is on: alone, or followed by a true word."""
    return not values or values[0].lower() not in (*FALSE, "none", "")


def parts_as_switches(pairs: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """LLaVA-NeXT's ``mm_tunable_parts``, which lists all that trains, as the switches that say the same.

    Raises:
        TrainingError: no part or an unknown one; a switch beside it that says something else.
    """
    given = {RENAMED.get(name, name): values for name, values in pairs}
    if "mm_tunable_parts" not in given:
        return pairs
    text = ",".join(given["mm_tunable_parts"])
    parts = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in parts if part not in TUNABLE_PARTS]
    if unknown or not parts:
        raise TrainingError(
            f"--mm_tunable_parts {text}: found {', '.join(unknown) or 'no part'}; "
            f"allowed, separated by commas: {', '.join(TUNABLE_PARTS)}"
        )
    meant = {
        "tune_mm_mlp_adapter": "mm_language_model" not in parts,
        "freeze_mm_mlp_adapter": "mm_mlp_adapter" not in parts,
        "train_vision_tower": "mm_vision_tower" in parts,
        "freeze_backbone": False,
    }
    for name, on in meant.items():
        if name in given and is_on(given[name]) != on:
            raise TrainingError(
                f"--{name} {' '.join(given[name])}: contradicts --mm_tunable_parts {text}, which lists all"
                " that trains; leave one of them out"
            )
    others = [
        pair for pair in pairs if pair[0] != "mm_tunable_parts" and RENAMED.get(pair[0], pair[0]) not in meant
    ]
    return others + [(name, ["True"]) for name, on in meant.items() if on]


def translate(argv: Sequence[str], known: Sequence[str], tf32_works: bool) -> tuple[list[str], list[str]]:
    """LLaVA's command line as today's.

    Args:
        argv: the command line without the program.
        known: every flag that exists today.
        tf32_works: whether this machine's GPU has TF32.

    Returns:
        the new command line, and one notice a flag that was changed.

    Raises:
        TrainingError: an unknown flag, with the nearest known one; a flag that can't be honoured.
    """
    out: list[str] = []
    notices: list[str] = []
    pairs = parts_as_switches(split_flags(argv))
    given = {name for name, _ in pairs}
    for name, values in pairs:
        if name in WITHOUT_EFFECT:
            notices.append(f"--{name} has no effect: {WITHOUT_EFFECT[name]}")
        elif name in REFUSED:
            if is_on(values):
                raise TrainingError(
                    f"--{name} {' '.join(values)}: not supported: {REFUSED[name]}; leave it out or give False"
                )
        elif name == "tf32" and is_on(values) and not tf32_works:
            notices.append("--tf32 True is ignored: no GPU with TF32 here")
        elif name == "warmup_ratio" and "warmup_steps" in given:
            notices.append("--warmup_ratio is ignored: --warmup_steps is given")
        elif name == "deepspeed" and values:
            out += ["--deepspeed", deepspeed_config(values[0], notices)]
        elif name == "report_to":
            # the parser takes one value; _adjust takes them apart again
            out += ["--report_to", ",".join(values)]
        elif name == "fsdp" and (not values or values[0].lower() in (*TRUE, *FALSE)):
            out += ["--fsdp"] * is_on(values)
        elif (new := RENAMED.get(name, name)) in known:
            if new == "warmup_steps" and name == "warmup_ratio" and float(values[0]) >= 1:
                raise TrainingError(
                    f"--warmup_ratio {values[0]}: allowed is a share from 0 to below 1; use --warmup_steps"
                    " for steps"
                )
            out += [f"--{new}", *values]
        else:
            raise TrainingError(unknown_flag(name, known))
    return out, notices


def unknown_flag(name: str, known: Sequence[str]) -> str:
    """The message for a flag that does not exist."""
    every = [*known, *RENAMED, *WITHOUT_EFFECT, "mm_tunable_parts"]
    near = difflib.get_close_matches(name, every, n=1, cutoff=0.6)
    hint = f"did you mean --{near[0]}?" if near else "`python -m llava_ext.train --help` lists all flags"
    return f"--{name}: unknown flag; {hint}"


def deepspeed_config(path: str, notices: list[str]) -> str:
    """The DeepSpeed JSON: the file itself, else the one of this name that comes with the package."""
    if Path(path).is_file():
        return path
    shipped = Path(__file__).parents[1] / "deepspeed" / Path(path).name
    if shipped.is_file():
        if Path(path) != shipped and len(Path(path).parts) > 1:
            notices.append(f"--deepspeed {path} does not exist; using {shipped.name} of this package")
        return str(shipped)
    names = ", ".join(sorted(item.name for item in shipped.parent.glob("*.json")))
    raise TrainingError(f"--deepspeed {path}: no such file; give a path, or one of {names}")
