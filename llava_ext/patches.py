"""Every change that is made to a library while it runs, and why.

Each has a test in ``tests/test_patches.py`` that shows the library without it, and so fails when it is no
longer needed. Nothing heavy is loaded with this module.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from functools import partial
from pickle import UnpicklingError
from typing import Any

from .errors import say

# -- accelerate --------------------------------------------------------------------------------------------


def keep_deepspeed_out() -> None:
    """accelerate imports DeepSpeed, for seconds, only to see that the model is none of its engines."""
    import accelerate.utils.other

    accelerate.utils.other.is_deepspeed_available = lambda: False


def allow_fsdp_on_cpu() -> None:
    """Lets accelerate take its FSDP path: torch's ``fully_shard`` runs with gloo, but accelerate asks for an
    accelerator.

    The type of the process group that accelerate keeps is read once, when the trainer makes its
    ``Accelerator``, which then replaces it by FSDP; the device stays the CPU.
    """
    from accelerate import DistributedType, PartialState

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


# -- transformers -----------------------------------------------------------------------------------------


@contextmanager
def without_zero3() -> Iterator[None]:
    """While it lasts, models are built and saved as without ZeRO-3, which would partition and gather their
    parameters.
    """
    from transformers.integrations import deepspeed

    before = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before


def tolerate_failures(tracker: Any) -> None:
    """From its first event after the start on, a tracker that fails is said once and left out; the training
    goes on.

    W&B's own process, say, dies of the signal that tells the job to save, and the next log line raises.
    """
    events = [name for name in dir(tracker) if name.startswith("on_")]
    for name in set(events) - {"on_init_end", "on_train_begin"}:
        setattr(tracker, name, partial(_try_event, tracker, getattr(tracker, name), events))


def _try_event(
    tracker: Any, event: Callable[..., Any], events: Sequence[str], *args: Any, **kwargs: Any
) -> Any:
    try:
        return event(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - a tracker may raise anything
        name = type(tracker).__name__.removesuffix("Callback")
        found = f"{type(error).__name__}: {error}"
        say(f"{name} has failed ({found}) and gets nothing more; metrics.jsonl has every step")
        for silenced in events:
            setattr(tracker, silenced, _do_nothing)
        return None


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass


# -- torch ------------------------------------------------------------------------------------------------


def start_workers_within(
    loader: Any, context: Callable[[], AbstractContextManager[None]], first: Callable[[], None]
) -> None:
    """A loader's workers are started inside ``context`` and call ``first`` before anything else.

    torch has a hook for the second, but none for the first: a signal to the whole job would end a worker that
    is just being started.
    """
    base = getattr(loader, "base_dataloader", loader)  # accelerate's own is a shell around it
    base.worker_init_fn = partial(_start_worker, first, base.worker_init_fn)
    base._get_iterator = partial(_start_workers, context, base._get_iterator)


def _start_workers(context: Callable[[], AbstractContextManager[None]], start: Callable[[], Any]) -> Any:
    with context():
        return start()


def _start_worker(first: Callable[[], None], prepare: Callable[[int], None] | None, number: int) -> None:
    first()
    if prepare is not None:
        prepare(number)


def draw_masks_as_uncompiled() -> None:
    """Compiled code draws dropout's masks as uncompiled code does.

    torch's compiler has random numbers of its own: from the same seed a compiled step would leave out other
    channels, and a training that goes on without the compiler would not be the same.
    """
    import torch._inductor.config

    torch._inductor.config.fallback_random = True


# -- DeepSpeed --------------------------------------------------------------------------------------------

# What DeepSpeed pickles beside tensors; nothing else is unpickled.
PICKLED = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)


def read_only_tensors() -> None:
    """Makes every ``torch.load`` of this process one with ``weights_only``, DeepSpeed's own included."""
    import torch

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    known = [getattr(importlib.import_module(module), name) for module, name in PICKLED]
    torch.serialization.add_safe_globals([*known, (_member, "builtins.getattr")])


def _member(kind: Any, name: str) -> Any:
    """A member of an enumeration, which Python 3.11.0 to 3.11.3 pickle as ``getattr(kind, name)``."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise UnpicklingError(f"getattr({kind!r}, {name!r}) in a checkpoint")


def keep_shared_memory_out() -> None:
    """DeepSpeed on CPUs compiles an operator at first use, for minutes; a killed build leaves a lock that
    hangs every start.
    """
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False


def use_checkpointing(engine: Any, load: Callable[..., Any]) -> None:
    """Lets an engine save without the weights that do not train, and read with ``load(engine, folder, ...)``.

    transformers asks for the first with adapters only, and has no place for the second.
    """
    if not isinstance(engine.save_checkpoint, partial):
        engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        engine.load_checkpoint = partial(load, engine)


def separate_groups(optimizer: Any, stated: Sequence[Mapping[str, Any]]) -> None:
    """Gives each parameter group its own settings and each parameter its own step counter.

    DeepSpeed's ZeRO-3 loader of universal checkpoints takes the first group's settings (learning rate, weight
    decay) for all, and lets all parameters share one counter, which then counts once for each group.
    ``stated``: the saved groups.
    """
    import torch

    for group, settings in zip(optimizer.param_groups, stated, strict=True):
        group.update({name: value for name, value in settings.items() if name != "params"})
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def replay_steps(optimizer: Any) -> None:
    """Brings DeepSpeed's CPU Adam to the bits it had when the loaded state was saved.

    It keeps the powers of its betas outside of its state, multiplied up step by step; after loading it would
    compute them afresh, with another rounding. The steps are repeated on one number, which costs microseconds
    each.
    """
    import torch

    if not hasattr(optimizer, "ds_opt_adam"):
        return
    steps = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    if not steps:
        return
    group = optimizer.param_groups[0]
    one = [torch.zeros(1) for _ in range(4)]
    for step in range(1, max(steps) + 1):
        settings = (*group["betas"], group["eps"], 0.0, group["bias_correction"])
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, *settings, *one)
