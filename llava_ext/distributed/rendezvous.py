"""The rendezvous of a training's processes, before anything is loaded: who is missing or does not fit is said
by name.

Without this a process that never starts shows as a silent wait of half an hour, and two processes on one GPU
as an error deep inside NCCL. The rendezvous uses the key-value store that torchrun keeps, so it works
whatever the network between the GPUs does; started without torchrun, there is none, and the check is left
out.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..errors import NoVerdict, say

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed")
VERDICT = "verdict"


def describe(local_rank: int, on_gpus: bool) -> dict[str, Any]:
    """What one process says of itself: where it runs, on which GPU, with which packages."""
    import torch

    gpus = torch.cuda.device_count() if on_gpus and torch.cuda.is_available() else 0
    gpu = torch.cuda.get_device_properties(local_rank) if local_rank < gpus else None
    return {
        "host": socket.gethostname(),
        "local_rank": local_rank,
        "gpus": gpus,
        "gpu": str(getattr(gpu, "uuid", f"cuda:{local_rank}")) if gpu else None,
        "model": gpu.name if gpu else None,
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def problems(said: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Why processes that say this can't train together, in words; ``said`` is by rank."""
    found = []
    for rank, facts in sorted(said.items()):
        if facts["gpus"] and facts["gpu"] is None:
            found.append(
                f"rank {rank} on {facts['host']} is process number {facts['local_rank'] + 1} there and sees"
                f" {facts['gpus']} GPUs: start as many processes as GPUs"
            )
    with_gpu = {rank: facts for rank, facts in said.items() if facts["gpu"]}
    if 0 < len(with_gpu) < len(said):
        without = [f"{rank} on {said[rank]['host']}" for rank in sorted(said.keys() - with_gpu.keys())]
        found.append(f"some ranks have a GPU and others none: {', '.join(without)}")
    shared = Counter((facts["host"], facts["gpu"]) for facts in with_gpu.values())
    for (host, gpu), times in shared.items():
        if times > 1:
            found.append(f"{times} ranks share the GPU {gpu} on {host}: give each its own")
    return found + _other_versions(said)


def _other_versions(said: Mapping[int, Mapping[str, Any]]) -> list[str]:
    first = said[min(said)]
    return [
        f"{name} is {facts['versions'][name]} for rank {rank} on {facts['host']} and {wanted} for rank"
        f" {min(said)} on {first['host']}: use one environment for all"
        for rank, facts in sorted(said.items())
        for name, wanted in first["versions"].items()
        if facts["versions"][name] != wanted
    ]


def wait_for_all(timeout_s: float, on_gpus: bool) -> None:
    """Waits until every process of the training is there, compares them, and says on how many machines they
    run.

    ``on_gpus`` says whether each is to have a GPU of its own (where there are any).

    Raises:
        NoVerdict: on every process that has come, when one is missing after ``timeout_s`` or does not fit.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or int(os.environ["WORLD_SIZE"]) < 2:
        return
    from torch.distributed import PrefixStore, TCPStore

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # the first rank may come later than the others, and then waits for all
    patience = timedelta(seconds=timeout_s + min(60.0, timeout_s))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = PrefixStore("llava_ext/rendezvous", TCPStore(address, port, is_master=False, timeout=patience))
    store.set(str(rank), json.dumps(describe(int(os.environ.get("LOCAL_RANK", "0")), on_gpus)))
    if rank == 0:
        store.set(VERDICT, json.dumps(_verdict(store, size, timeout_s)))
    try:
        store.wait([VERDICT], patience)
    except RuntimeError as error:
        raise NoVerdict(
            f"nothing was heard of rank 0 within {patience.total_seconds():g} s; the log of the first machine"
            " says why"
        ) from error
    found = json.loads(store.get(VERDICT))
    if found:
        raise NoVerdict("the processes of this training do not fit together:\n  " + "\n  ".join(found))


def _verdict(store: Any, size: int, timeout_s: float) -> list[str]:
    """The problems that rank 0 sees; none when all is well."""
    said = _collect(store, size, timeout_s)
    missing = [rank for rank in range(size) if rank not in said]
    if missing:
        hosts = Counter(facts["host"] for facts in said.values())
        there = ", ".join(f"{count} on {host}" for host, count in sorted(hosts.items()))
        return [
            f"nothing was heard of rank {', '.join(map(str, missing))} within {timeout_s:g} s; {len(said)} of"
            f" {size} are there ({there}). The logs of the machines that are missing say why;"
            " --meeting_timeout_s gives slow ones more time"
        ]
    hosts = Counter(facts["host"] for facts in said.values())
    models = sorted({facts["model"] or "CPU" for facts in said.values()})
    say(f"{size} processes on {len(hosts)} machines ({', '.join(sorted(hosts))}), {', '.join(models)}")
    return problems(said)


def _collect(store: Any, size: int, timeout_s: float) -> dict[int, dict[str, Any]]:
    """What the processes have said by the deadline, by rank."""
    deadline = time.monotonic() + timeout_s
    said: dict[int, dict[str, Any]] = {}
    waiting: Sequence[int] = range(size)
    while waiting and time.monotonic() < deadline:
        for rank in waiting:
            if store.check([str(rank)]):
                said[rank] = json.loads(store.get(str(rank)))
        waiting = [rank for rank in range(size) if rank not in said]
        if waiting:
            time.sleep(0.1)
    return said
