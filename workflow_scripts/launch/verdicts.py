"""Ends of a training that will repeat: each stands in `verdict.json` until a setting, a record or the code
has changed. And those that its user wants, which stand in `ended.json` until they are taken back.

The data, the models and the parent's weights are in the name of the folder; what else could mend it is in the
cause.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_ext import files
from workflow_scripts.config.compute import ComputeSpec
from workflow_scripts.config.stages import StageSpec
from workflow_scripts.io import UserError, digest, write_json
from workflow_scripts.launch.command import deepspeed_file
from workflow_scripts.launch.preflight import versions

VERDICT = "verdict.json"
STATUS = "verdict"
ENDED = "ended"
ROOT = Path(__file__).parents[2]
# Flags of `llava_ext.train` whose key in the configuration has another name: the section and the key.
STAGE, COMPUTE, MODEL, MIXTURE = "stages.{stage}", "compute.{compute}", "model", "mixtures.{mixture}"
RENAMED = {
    "num_train_epochs": (STAGE, "epochs"),
    "lr_scheduler_type": (STAGE, "scheduler"),
    "lr_scheduler_kwargs": (STAGE, "min_lr_rate"),
    "mismatch_bound": (STAGE, "max_mismatch_share"),
    "supervised_share_bound": (STAGE, "min_supervised_share"),
    "version": (STAGE, "prompt_version"),
    "data_path": (STAGE, "mixture"),
    "data_seed": (STAGE, "seed"),
    "skip_samples": (MIXTURE, "skip_samples"),
    "vision_tower_lr": (STAGE, "vision_tower_learning_rate"),
    "lora_enable": (STAGE, "lora"),
    "lora_r": (STAGE, "lora.r"),
    "lora_alpha": (STAGE, "lora.alpha"),
    "lora_dropout": (STAGE, "lora.dropout"),
    "lora_bias": (STAGE, "lora.bias"),
    "freeze_mm_mlp_adapter": (STAGE, "train_projector"),
    "gradient_accumulation_steps": (STAGE, "global_batch_size"),
    "per_device_train_batch_size": (COMPUTE, "per_device_batch_size"),
    "bf16": (COMPUTE, "precision"),
    "fp16": (COMPUTE, "precision"),
    "attention": (COMPUTE, "kernels.attention"),
    "fusion": (COMPUTE, "kernels.fusion"),
    "checkpoint_layers": (COMPUTE, "kernels.checkpoint_layers"),
    "pack": (COMPUTE, "packing"),
    "cache_pixels": (COMPUTE, "cache_pixels_mb"),
    "dataloader_num_workers": (COMPUTE, "dataloader_workers"),
    "watchdog_minutes": (COMPUTE, "stall_min"),
    "ddp_timeout": (COMPUTE, "distributed_timeout_s"),
    "deepspeed": (COMPUTE, "parallel"),
    "fsdp": (COMPUTE, "parallel"),
    "use_cpu": (COMPUTE, "gpus_per_node"),
    "model_name_or_path": (MODEL, "llm"),
    "vision_tower": (MODEL, "vision_tower"),
    "mm_projector_type": (MODEL, "projector_type"),
    "mm_vision_select_layer": (MODEL, "vision_feature_layer"),
    "mm_vision_select_feature": (MODEL, "vision_feature_select"),
}


@dataclass(frozen=True)
class Cause:
    """What decides, besides the folder's name, how a training ends."""

    settings: str
    code: str

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Cause:
        """Of a complete specification, with the code and the packages that this process would train with."""
        return cls(settings_digest(spec), code_digest())


def cause_digest(spec: Mapping[str, Any]) -> str:
    """The cause in one word."""
    return digest(asdict(Cause.of(spec)), 16)


def settings_digest(spec: Mapping[str, Any]) -> str:
    """The digest of everything that the configuration says, the content of a DeepSpeed file of the user's
    included.
    """
    own = spec["compute"].get("deepspeed_config")
    path = Path(deepspeed_file(ComputeSpec.model_validate(spec["compute"])) or "") if own else None
    content = files.sha256(path) if path and path.is_file() else None
    return digest({"spec": json.loads(json.dumps(spec)), "deepspeed": content}, 16)


def code_digest() -> str:
    """The digest of the training code and of the packages' versions."""
    code = [
        *sorted((ROOT / "llava_ext").rglob("*.py")),
        *sorted((ROOT / "llava_ext/deepspeed").glob("*.json")),
    ]
    content = {str(path.relative_to(ROOT)): files.sha256(path) for path in code}
    return digest({"files": content, "versions": versions()}, 16)


def read_verdict(state: Path) -> dict[str, Any]:
    """The verdict that stands in a state folder; empty where there is none."""
    try:
        found = json.loads((state / VERDICT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and {"reason", "settings", "code", "log"} <= found.keys() else {}


def read_end(run: Path) -> dict[str, Any]:
    """Who ended a training for good and when, from its run folder; empty where nobody did."""
    try:
        found = json.loads((run / f"{ENDED}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "reason" in found else {}


def end_for_good(run: Path, who: str) -> None:
    """No attempt of the training in this run folder starts any more."""
    when = time.strftime("%Y-%m-%d %H:%M")
    run.mkdir(parents=True, exist_ok=True)
    reason = (
        f"ended by {who} at {when}; `python -m workflow_scripts.end --again {run.parent.name}/{run.name}`"
    )
    write_json(run / f"{ENDED}.json", {"reason": f"{reason} takes that back", "time": time.time()})


def refuse_what_is_ended(run: Path, label: str) -> None:
    """Raises UserError for a training that its user has ended."""
    if found := read_end(run):
        raise UserError(f"{label}: {found['reason']}")


def pronounce(state: Path, spec: Mapping[str, Any], reason: str, log: str) -> None:
    """Records why a training ended, in the configuration's words."""
    cause = Cause.of(spec)
    content = {"reason": in_config_words(reason, spec), "log": log, "time": time.time()}
    write_json(state / VERDICT, {**content, "settings": cause.settings, "code": cause.code})


def refuse_to_repeat(state: Path, label: str, spec: Mapping[str, Any]) -> None:
    """Raises UserError when a verdict stands; one of other settings or other code is taken away."""
    found = read_verdict(state)
    if not found:
        return
    if Cause(found["settings"], found["code"]) == Cause.of(spec):
        write_json(state / VERDICT, found | {"told": time.time()})  # for who started this job in vain
        raise UserError(explain(state, label, spec, found))
    print(f"{label}: settings or code have changed since its verdict; it is tried again", flush=True)
    (state / VERDICT).unlink(missing_ok=True)


def explain(state: Path, label: str, spec: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The reason, and what has to change before a training is tried again."""
    return (
        f"{label}: {found['reason']}\nAnother attempt would end the same way, so there is none. Its log:"
        f" {state / found['log']}. A changed setting, record or code is tried again by itself;"
        f" {try_again(spec)}"
    )


def try_again(spec: Mapping[str, Any]) -> str:
    """What to do when the cause lay in nothing that can be seen here."""
    return (
        f"after a mend elsewhere (a disk, a driver) raise compute.{spec['recipe']['compute']}.try_again"
        " by one"
    )


def in_config_words(text: str, spec: Mapping[str, Any]) -> str:
    """A message of `llava_ext.train` with the configuration's keys in the place of its flags."""
    return re.sub(r"--(\w+)", lambda match: config_key(match[1], spec) or match[0], text)


def config_key(flag: str, spec: Mapping[str, Any]) -> str | None:
    """The key in the configuration that a flag comes from, `stages.finetune.learning_rate` say; None where
    there is none.
    """
    if flag in RENAMED:
        section, key = RENAMED[flag]
    elif flag in StageSpec.model_fields:
        section, key = STAGE, flag
    elif flag in ComputeSpec.model_fields:
        section, key = COMPUTE, flag
    elif flag in spec["interventions"]:
        section, key = "interventions", flag
    else:
        return None
    names = {key: spec["recipe"][key] for key in ("compute", "mixture")}
    return f"{section.format(stage=spec['stage'], **names)}.{key}"
