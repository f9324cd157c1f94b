"""How a training is computed: machines, parallelism, precision. Only `precision` changes results on
purpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from llava_ext.kernels import ATTENTIONS, FUSIONS, LAYERS, SEGMENTED, Kernels
from workflow_scripts.config.base import StrictModel
from workflow_scripts.config.types import Count, NonNegative, Positive
from workflow_scripts.stages import STAGES

LEAST_TRAINING_S = 30
AUTO = "auto"


def split_gres(gres: str) -> tuple[str, int]:
    """A Slurm request in its kind and its number: `gpu:a100:8` -> (`gpu:a100`, 8), `gpu:a100` ->
    (`gpu:a100`, 1).
    """
    kind, _, count = gres.rpartition(":")
    return (kind, int(count)) if kind and count.isdigit() else (gres, 1)


if TYPE_CHECKING:
    Attention = str
    Fusion = str
    Layers = str
    StageName = str
else:
    Attention, Fusion, Layers = Literal[ATTENTIONS], Literal[FUSIONS], Literal[LAYERS]
    StageName = Literal[tuple(STAGES)]


class KernelSpec(StrictModel):
    """How a step is computed. Only rounding depends on it, so it is no part of a run and may change while one
    is under way.
    """

    attention: Attention = "sdpa"
    """The LLM's attention. `varlen` computes each sample of a packed row by itself, with torch alone;
    `flash_attention_2` needs the package flash-attn.
    """
    fusion: Fusion = "none"
    """What fuses all that is not a matrix product: torch's compiler (`compile`), or the package liger-kernel
    (`liger`).
    """
    checkpoint_layers: Layers | Positive = "none"
    """Which decoder layers' activations are recomputed instead of kept: all, none, or every Nth."""


# Where keys of `compute` went, and what their values mean there.
MOVED = {"attention": "attention", "gradient_checkpointing": "checkpoint_layers"}


class ComputeSpec(StrictModel):
    """A kind of job: what it asks for and how it spreads. Site values (partition, account) belong in
    `slurm/`.
    """

    nodes: Positive = 1
    """Machines in one job."""
    gpus_per_node: Count = 0
    """GPUs on each machine; 0 trains on the CPU."""
    processes_per_node: Positive | None = None
    """Processes on each machine; one per GPU when left out, and 1 without GPUs."""
    per_device_batch_size: Literal["auto"] | Positive = 16
    """Samples that one process computes at a time. Gradient accumulation follows from the stage's global
    batch. `auto`: as many as fit into `gpu_gb`, at most 32, the same for all experiments.
    """
    cpus: Positive = 1
    """CPUs on each machine."""
    mem_mb: Positive = 4000
    """Memory on each machine in MB."""
    runtime_min: Positive = 60
    """Time limit of one attempt in minutes; a training that needs longer saves ahead of it and continues."""
    expected_hours: dict[StageName, NonNegative] | NonNegative | None = None
    """How long a training takes, for the printed plan; one number, or one a stage."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the training."""
    parallel: Literal["none", "ddp", "zero2", "zero3", "fsdp"] = "none"
    """How the model is spread: not at all, DistributedDataParallel, DeepSpeed ZeRO-2 or ZeRO-3, or FSDP2."""
    offload: Literal["none", "optimizer", "parameters", "auto"] = "none"
    """What DeepSpeed moves to the CPU's memory: nothing, the optimizer, or (ZeRO-3) the parameters too.
    `auto`: the least with which it fits into `gpu_gb`.
    """
    deepspeed_config: str | None = None
    """A DeepSpeed JSON file of your own instead of the one that `parallel` and `offload` give."""
    kernels: KernelSpec = KernelSpec()
    """How a step is computed. `attention` and `gradient_checkpointing` (`true`: `checkpoint_layers: all`) may
    also stand beside it, without this section.
    """
    packing: bool = False
    """Collate without padding: one row of all samples of a micro-batch, each attending to itself only."""
    tf32: bool = False
    """Allow TensorFloat-32 on GPUs that have it."""
    dataloader_workers: Count | None = None
    """Processes that decode images, for each training process. Left out: on GPUs as many as the machine's
    cores allow, on the CPU none.
    """
    gres: Annotated[str, Field(pattern=r"^\w+(:[\w.]+)?(:\d+)?$")] | None = None
    """The Slurm request for the GPUs of one machine, as in `gpu:a100:8`; `gpu:N` when left out."""
    gpu_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of one GPU in GB (10^9 bytes), as its maker says it: 80, 24. With it the plan says whether a
    training fits, and what would.
    """
    cache_pixels_mb: Count = 0
    """Memory in which each process keeps preprocessed images; useful for small data."""
    distributed_timeout_s: Positive = 1800
    """After how many seconds without an answer of the other processes a training stops."""
    stall_min: Positive = 30
    """After how many minutes without a finished step a training stops with a message."""
    save_before_end_s: Annotated[int, Field(ge=30)] = 120
    """How many seconds before its time limit a Slurm job is told to save; large states need more."""
    attempts: Positive = 4
    """How often a training may be started before the workflow gives up. Each attempt continues the one
    before, so a training that needs 40 hours under a limit of 8 needs at least 5 (and some to spare for
    preemptions).
    """
    max_stuck_attempts: Positive = 3
    """After how many failed attempts in a row without any progress no further one is started."""
    try_again: Count = 0
    """Raise it by one to have a training tried again that was given up, after a mend that the
    configuration does not show (a disk, a driver). Whatever else is changed does the same.
    """

    @property
    def processes(self) -> int:
        """Training processes on all machines together."""
        return self.nodes * self.local_processes

    @property
    def local_processes(self) -> int:
        """Training processes on one machine."""
        return self.processes_per_node or max(1, self.gpus_per_node)

    @property
    def leaves_open(self) -> bool:
        """Whether something follows from the GPU's memory."""
        return AUTO in (self.per_device_batch_size, self.offload, self.kernels.checkpoint_layers)

    def hours(self, stage: str) -> float | None:
        """The expected hours of a training of that stage."""
        hours = self.expected_hours
        return hours.get(stage) if isinstance(hours, dict) else hours

    @model_validator(mode="before")
    @classmethod
    def _kernels_of_before(cls, data: Any) -> Any:
        """`attention` and `gradient_checkpointing`, as they stood before there was a section for them."""
        given = {key: data[key] for key in MOVED if key in data} if isinstance(data, Mapping) else {}
        if not given:
            return data
        if "kernels" in data:
            key = next(iter(given))
            raise ValueError(
                f"{key} stands beside kernels, which has {MOVED[key]}; leave {key} out and set"
                f" kernels.{MOVED[key]}"
            )
        if "gradient_checkpointing" in given:
            value = given["gradient_checkpointing"]
            if not isinstance(value, bool):
                raise ValueError(f"gradient_checkpointing: found {value!r}; allowed are true and false")
            given["gradient_checkpointing"] = "all" if value else "none"
        others = {key: value for key, value in data.items() if key not in MOVED}
        return others | {"kernels": {MOVED[key]: value for key, value in given.items()}}

    @model_validator(mode="after")
    def _fits_together(self) -> ComputeSpec:
        if self.gpus_per_node and self.processes_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"processes_per_node is {self.processes_per_node} but gpus_per_node is {self.gpus_per_node}: "
                "one process drives one GPU; leave processes_per_node out"
            )
        if self.parallel == "none" and self.processes > 1:
            raise ValueError(
                f"parallel is none, but there are {self.processes} processes; set parallel to ddp, zero2,"
                " zero3 or fsdp"
            )
        if self.offload not in ("none", AUTO) and self.parallel not in ("zero2", "zero3"):
            raise ValueError(f"offload: {self.offload} needs parallel: zero2 or zero3, found {self.parallel}")
        if self.offload == "parameters" and self.parallel != "zero3":
            raise ValueError("offload: parameters needs parallel: zero3; with zero2 use offload: optimizer")
        return self

    @model_validator(mode="after")
    def _knows_the_memory(self) -> ComputeSpec:
        if self.per_device_batch_size == AUTO and not self.gpus_per_node:
            raise ValueError(
                "per_device_batch_size: auto follows from a GPU's memory, but gpus_per_node is 0; give a"
                " number"
            )
        for key in ("per_device_batch_size", "offload"):
            if getattr(self, key) == AUTO and self.gpus_per_node and self.gpu_gb is None:
                raise ValueError(
                    f"{key}: auto follows from the GPU's memory, which is not stated; set gpu_gb (80, 48,"
                    f" 24), or another {key}"
                )
        return self

    @model_validator(mode="after")
    def _fits_slurm(self) -> ComputeSpec:
        left = self.runtime_min * 60 - self.save_before_end_s
        if left < LEAST_TRAINING_S:
            raise ValueError(
                f"save_before_end_s: {self.save_before_end_s} leaves {max(left, 0)} s of runtime_min:"
                f" {self.runtime_min} to train in, at least {LEAST_TRAINING_S} are needed; lower it or raise"
                " runtime_min"
            )
        kind, count = split_gres(self.gres or "gpu")
        if self.gres and self.gpus_per_node and count != self.gpus_per_node:
            raise ValueError(
                f"gres: {self.gres} asks for {count} GPUs, but gpus_per_node is {self.gpus_per_node}; "
                f"set gres: {kind}:{self.gpus_per_node}"
            )
        return self

    @model_validator(mode="after")
    def _needs_gpus(self) -> ComputeSpec:
        if self.gpus_per_node == 0:
            for key, value in (("precision", "fp16"), ("tf32", True)):
                if getattr(self, key) == value:
                    raise ValueError(
                        f"{key}: {value} needs a GPU, but gpus_per_node is 0; choose another {key}"
                    )
        chosen = Kernels(**self.kernels.model_dump())
        gpu, half = self.gpus_per_node > 0, self.precision != "fp32"
        for name, sentence in chosen.problems(gpu=gpu, half=half, engine=self.parallel):
            raise ValueError(f"kernels.{name}: {sentence}")
        if self.packing and chosen.attention not in SEGMENTED and gpu:
            raise ValueError(
                f"packing: true with attention: {chosen.attention} computes every pair of tokens of a row,"
                " most of them in vain; set kernels.attention: varlen, or packing: false"
            )
        if self.deepspeed_config and self.parallel not in ("zero2", "zero3"):
            raise ValueError(f"deepspeed_config needs parallel: zero2 or zero3, found {self.parallel}")
        return self
