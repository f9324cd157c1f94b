"""The rendezvous of a training's processes, before anything is loaded."""

from __future__ import annotations

import copy
import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from llava_ext import errors
from llava_ext.distributed import processes, rendezvous

FACTS = {
    "host": "n1",
    "local_rank": 0,
    "gpus": 2,
    "gpu": "GPU-a",
    "model": "A100",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
}


def said(*changes):
    """What ranks 0, 1, ... say: the first as above, the others with these changes."""
    return dict(enumerate([FACTS, *(copy.deepcopy(FACTS) | change for change in changes)]))


def test_processes_that_fit_have_no_problems():
    assert rendezvous.problems(said({"local_rank": 1, "gpu": "GPU-b"}, {"host": "n2"})) == []
    here = rendezvous.describe(0, on_gpus=True)
    assert torch.__version__.startswith(
        here["versions"]["torch"]
    )  # a CUDA wheel names its build in one of the two only
    assert rendezvous.problems({0: here, 1: here | {"host": "n2"}}) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local_rank": 1}, "2 ranks share the GPU GPU-a on n1"),
        ({"local_rank": 2, "gpu": None}, "rank 1 on n1 is process number 3 there and sees 2 GPUs"),
        ({"host": "n2", "gpus": 0, "gpu": None}, "some ranks have a GPU and others none: 1 on n2"),
        (
            {"host": "n2", "versions": FACTS["versions"] | {"torch": "2.12.0"}},
            "torch is 2.12.0 for rank 1 on n2 and 2.13.0 for rank 0 on n1: use one environment for all",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    assert message in "\n".join(rendezvous.problems(said(change)))


class Come:
    """A fork of this process, whose libraries are loaded, that does something; what it says at its end."""

    def __init__(self, target: Callable[..., None], *arguments: object, **environment: object):
        context = multiprocessing.get_context("fork")
        self.heard, said = context.Pipe(duplex=False)
        values = {name: str(value) for name, value in environment.items()}
        self.process = context.Process(target=self.run, args=(target, arguments, values, said))
        self.process.start()
        said.close()

    @staticmethod
    def run(target, arguments, values, said):
        os.environ.update(values)
        try:
            target(*arguments)
            said.send("")
        except errors.TrainingError as error:
            said.send(str(error))
            processes.exit_with(1)

    def end(self) -> tuple[int | None, str]:
        """Its status, and its error."""
        assert self.heard.poll(100)
        text = self.heard.recv()
        self.process.join(100)
        return self.process.exitcode, text


def come(store: TCPStore, rank: int, size: int, timeout_s: float) -> Come:
    """One process that comes to the rendezvous, as torchrun would start it."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": store.port}
    values |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return Come(partial(rendezvous.wait_for_all, on_gpus=False), timeout_s, **values)


@pytest.fixture
def store():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_a_missing_process_is_named_by_all_that_came(store):
    came = [come(store, rank, 4, 5) for rank in (0, 2)]
    for process in came:
        status, text = process.end()
        assert status == 1
        assert "nothing was heard of rank 1, 3 within 5 s; 2 of 4 are there" in text
        assert f"2 on {os.uname().nodename}" in text


def test_a_missing_first_process_is_named_too(store):
    status, text = come(store, 1, 2, 1).end()
    assert status == 1 and "nothing was heard of rank 0 within 2 s" in text


def test_all_go_on_when_all_have_come(store):
    for process in [come(store, rank, 3, 100) for rank in range(3)]:
        assert process.end() == (0, "")


def meet(rank: int, port: int) -> None:
    """Two processes meet, and then the second one is silent."""
    there = TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=there, rank=rank, world_size=2)
    if rank == 1:
        dist.new_group(timeout=timedelta(seconds=3))
        time.sleep(60)
    processes.check_network(torch.device("cpu"), 3.0)


def test_a_network_that_does_not_answer_is_said_soon(store):
    """Two processes have met, and then nothing comes through.

    Ended by Python's own means, the first would now and then abort instead of exiting with 1.
    """
    first, second = (Come(meet, rank, store.port) for rank in range(2))
    try:
        status, text = first.end()
        assert status == 1
        assert (
            "can't reach each other (NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME" in text and "Timed out" in text
        )
    finally:
        second.process.kill()
        second.process.join()
