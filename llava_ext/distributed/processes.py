"""The processes of a training: their groups, a first word between them, their common end."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

from .. import patches
from ..errors import NoVerdict
from . import offload

NO_TRAFFIC = (
    "the processes of this training can't reach each other (NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names"
    " the network to use, NCCL_DEBUG=INFO shows more)"
)


def start(training: Any) -> None:
    """Process groups before anything is built: ZeRO-3 splits parameters while the model is made."""
    if training.deepspeed:
        _start_deepspeed(training)
        return
    if training.fsdp and training.device.type == "cpu" and training.world_size > 1:
        patches.allow_fsdp_on_cpu()
    patches.keep_deepspeed_out()


def _start_deepspeed(training: Any) -> None:
    patches.read_only_tensors()
    if offload.offloads_optimizer(training.hf_deepspeed_config.config):
        offload.build_cpu_adam()
    import deepspeed

    if training.device.type == "cpu":
        patches.keep_shared_memory_out()
        deepspeed.init_distributed(dist_backend="gloo")
    else:
        deepspeed.init_distributed()


def check_network(device: Any, timeout_s: float) -> None:
    """One small sum over all processes, before a model is loaded: a network that does not work shows here,
    and soon.

    Raises:
        NoVerdict: it fails, takes longer than ``timeout_s`` (with NCCL that ends the process), or is wrong.
    """
    import torch
    import torch.distributed as dist

    if not _is_one_of_several():
        return
    ones = torch.ones(1, device=device)
    try:
        group = dist.new_group(timeout=timedelta(seconds=timeout_s))
        dist.all_reduce(ones, group=group)
        found = int(ones.item())
        dist.destroy_process_group(group)
    except RuntimeError as error:
        raise NoVerdict(f"{NO_TRAFFIC}: {str(error).strip()}") from error
    if found != dist.get_world_size():
        raise NoVerdict(f"{NO_TRAFFIC}: a sum over all gives {found} instead of {dist.get_world_size()}")


def finish() -> None:
    """Closes the process groups when every process has written all; where there are several, ends this
    one.
    """
    if not _has_group():
        return
    import torch.distributed as dist

    several = _is_one_of_several()
    if several:
        dist.barrier()
    dist.destroy_process_group()
    if several:
        _exit_at_once(0)


def exit_with(status: int) -> NoReturn:
    """Ends this process with this exit status; where it is one of several, without Python's last steps.

    They would now and then abort in a thread of the communication library: torchrun would report a training
    that has finished as failed, and one that said its reason as crashed.
    """
    if _is_one_of_several():
        _exit_at_once(status)
    sys.exit(status)


def _exit_at_once(status: int) -> NoReturn:
    """Runs what packages registered for the end (W&B's last upload), and nothing more."""
    with suppress(SystemExit):
        sys.exit(status)  # W&B learns from this call, which it wraps, how the run has ended
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _has_group() -> bool:
    if "torch.distributed" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _is_one_of_several() -> bool:
    if not _has_group():
        return False
    import torch.distributed as dist

    return dist.get_world_size() > 1
