"""How much of a card a training uses: the operations of its model's products against time and peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..distributed.gather import count, whole_shape
from ..flops import CARDS, TERA, Counted, Products, attention_width, layer_weights, picture_flops
from .optimizer import LANGUAGE_MODEL, PROJECTOR, TOWER, component

# peft's names of the two halves of an adapter
ADAPTERS = frozenset(["lora_A", "lora_B"])


def products_of(model: Any) -> Products:
    """The products of a model (with or without adapters), and which of them learn, as its parameters say."""
    config, text = model.config, model.config.text_config.to_dict()
    trained, projector, adapters = set[str](), list[int](), 0
    for name, parameter in model.named_parameters():
        parts, part = ADAPTERS & set(name.split(".")), component(name)
        if len(whole_shape(parameter)) < 2:
            continue
        if parts:
            adapters += count([parameter])
        elif parameter.requires_grad:
            trained.add("layers" if part == LANGUAGE_MODEL and "layers" in name.split(".") else part)
        if part == PROJECTOR:
            projector.append(count([parameter]))
    layers = text["num_hidden_layers"]
    return Products(
        layers=layers * layer_weights(text),
        attention=layers * attention_width(text),
        head=text["vocab_size"] * text["hidden_size"],
        picture=picture_flops(config.vision_config.to_dict(), config.grid_side, config.tokens_before),
        patches=config.grid_side**2 + (config.tokens_before if config.keeps_cls else 0),
        projector=(projector[0], sum(projector[1:])),
        adapters=adapters,
        learns="layers" in trained,
        head_learns="lm_head" in trained,
        projects=PROJECTOR in trained,
        sees=TOWER in trained,
    )


@dataclass(frozen=True)
class Throughput:
    """A model's products, and what they are computed on.

    Attributes:
        processes: devices that share the work.
        peak: dense bf16 products of one of them, FLOP/s; None where its name is not in the register.
    """

    products: Products
    processes: int = 1
    peak: float | None = None

    @classmethod
    def of(cls, model: Any, training: Any) -> Throughput:
        """Of a model on the device of this process."""
        device = training.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        return cls(products_of(model), int(training.world_size), CARDS.get(name))

    def row(self, logs: Mapping[str, float], seconds: float) -> dict[str, float]:
        """The numbers of a log line: operations, TFLOP/s of each device, and the share of its peak where that
        is known.

        Args:
            logs: counts of all ranks in the last ``seconds``, under the names that the trainer logs.
        """
        seen = Counted(logs["tokens"], logs["attention_pairs"], logs["supervised_tokens"], logs["images"])
        flops = self.products.flops(seen)
        speed = flops / seconds / self.processes
        share = {"peak_share": speed / self.peak} if self.peak else {}
        return {"flops": flops, "tflop_per_s": speed / TERA, **share}
