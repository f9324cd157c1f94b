"""Fusion of a model's layers: torch's compiler, or Liger's kernels."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from .. import patches
from ..errors import TrainingError, say
from ..model.language_models import LANGUAGE_MODELS, known_language_models

BACKEND = "inductor"
# The names of the one activation that Liger's feed-forward layer computes, whatever a model asks for.
SWISH = ("silu", "swish")
ROTATION = "apply_rotary_pos_emb"
# Steps after which every kind of batch has been seen, and the layers compiled for it.
WARM = 10


def check_fusion(fusion: str, gpu: bool) -> None:
    """Refuses a fusion whose tools are missing here, before anything is loaded."""
    if fusion == "liger" and importlib.util.find_spec("liger_kernel") is None:
        raise TrainingError(
            "--fusion liger: needs the package liger-kernel, which is missing here; install it (`pip install"
            " -r envs/requirements-liger.txt`), or use compile, which needs none"
        )
    if fusion != "compile":
        return
    compilers = [os.environ[name] for name in ("CC", "CXX") if os.environ.get(name)]
    names = compilers or (["cc", "gcc", "clang"] if gpu else ["c++", "g++", "clang++"])
    if not any(map(shutil.which, names)):
        raise TrainingError(
            f"--fusion compile: needs a compiler, and none of {', '.join(names)} is on the PATH; install one,"
            " or use --fusion none"
        )
    if gpu and importlib.util.find_spec("triton") is None:
        raise TrainingError(
            "--fusion compile: needs the package triton on a GPU, which comes with torch's wheels for CUDA"
        )


def check_liger(model_type: str | None, activation: str = SWISH[0]) -> None:
    """Refuses a language model for which Liger's kernels are not known to be right."""
    if model_type not in LANGUAGE_MODELS:
        raise TrainingError(
            f"--fusion liger: not known to be right for {model_type} models; known are"
            f" {known_language_models()}; use --fusion compile"
        )
    if activation not in SWISH:
        raise TrainingError(
            f"--fusion liger: this language model has hidden_act {activation}, and Liger's feed-forward layer"
            f" knows {' and '.join(SWISH)} only; use --fusion compile"
        )


def fuse(model: Any, fusion: str) -> None:
    """Fuses the layers of a model (without a wrapper around it) in place."""
    if fusion == "compile":
        patches.draw_masks_as_uncompiled()
        found = list(layers(model))
        if not found:
            raise TrainingError("--fusion compile: found no layers in this model to compile; use none")
        for layer in found:
            _compile(layer)
    elif fusion == "liger":
        _use_liger(model)


def _compile(layer: Any) -> None:
    """Compiles what a layer computes; its hooks and its recomputation stay outside, where they see no
    compiler.
    """
    plain = type(layer).forward.__wrapped__.__get__(layer)
    compiled = torch.compile(plain, dynamic=True, backend=BACKEND)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if layer.gradient_checkpointing and layer.training:
            return layer._gradient_checkpointing_func(partial(compiled, **kwargs), *args)
        return compiled(*args, **kwargs)

    layer.forward = forward


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """The decoder's layers and the vision tower's."""
    return (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))


def _use_liger(model: Any) -> None:
    language = model.model.language_model
    check_liger(language.config.model_type, language.config.hidden_act)
    entry = LANGUAGE_MODELS[language.config.model_type]
    apply = getattr(importlib.import_module("liger_kernel.transformers"), entry.liger)
    # Its rotation takes both halves of a pair to turn alike, which the published table does not.
    rope = not (model.config.twoD_vision_embedding and model.config.published_behaviour)
    head = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # few logits are computed here
    apply(model=language, rope=rope, rms_norm=True, swiglu=True, **head)
    left = unfused(language, rope)
    if left:
        raise TrainingError(
            f"--fusion liger: this release of liger-kernel does not change {len(left)} parts of the language"
            f" model as asked ({', '.join(left[:3])}, ...); install the one in envs/requirements-liger.txt,"
            " or use --fusion compile"
        )


def unfused(language: Any, rope: bool) -> list[str]:
    """The parts of a language model that would not be computed as asked: norms and feed-forward layers that
    are not Liger's, a rotation that is Liger's (``rope``) or is not.
    """
    liger = importlib.import_module("liger_kernel.transformers")
    kinds = {type(language.norm): liger.LigerRMSNorm, type(language.layers[0].mlp): liger.LigerSwiGLUMLP}
    expected = ((name, module, kinds.get(type(module))) for name, module in language.named_modules())
    left = [
        name
        for name, module, kind in expected
        if kind is not None and getattr(module.forward, "__func__", None) is not kind.forward
    ]
    attend = inspect.unwrap(type(language.layers[0].self_attn).forward)
    rotates = attend.__globals__.get(ROTATION) is liger.liger_rotary_pos_emb
    if rotates is not rope or ROTATION not in attend.__code__.co_names:
        left.append("the rotation")
    return left


class Recompilations(TrainerCallback):
    """Says when a layer is compiled again after the first steps, and why: each costs seconds."""

    def __init__(self, warm: int = WARM) -> None:
        self.warm = warm
        self.steps = 0
        self.seen: set[Any] = set()
        self.count = 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.steps += 1
        known = {metrics.compile_id: metrics for metrics in _compiled()}
        new = [known[name] for name in known.keys() - self.seen]
        self.seen |= known.keys()
        if self.steps <= self.warm or not new:
            return
        self.count += len(new)
        reason = next((item.recompile_reason for item in new if item.recompile_reason), "no reason is given")
        say(
            f"step {state.global_step}: layers were compiled again, {self.count} times after the first"
            f" {self.warm} steps; the reason: {' '.join(reason.split())}"
        )


def _compiled() -> list[Any]:
    return torch._dynamo.utils.get_compilation_metrics()
