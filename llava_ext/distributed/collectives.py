"""What ranks tell each other; with one process nothing is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..errors import TrainingError


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    """Waits until every rank has come here."""
    if world_size() > 1:
        dist.barrier()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set on any rank; every rank must ask."""
    if world_size() == 1:
        return flag
    votes = torch.tensor([float(flag)], device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def from_all(value: Any) -> list[Any]:
    """The values of all ranks, in their order; every rank must ask."""
    found = [value] * world_size()
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found


def on_first_rank(work: Callable[[], Any]) -> Any:
    """Runs ``work`` on rank 0 and gives its result, or its error, to all."""
    if world_size() == 1:
        return work()
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [("result", work())]
        except TrainingError as error:
            box = [("error", error)]
    dist.broadcast_object_list(box, src=0)
    kind, value = box[0]
    if kind == "error":
        raise type(value)(str(value))
    return value
