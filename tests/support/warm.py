"""Trainings that begin in a process whose libraries are loaded: torch and transformers cost eight seconds of
processor time, the steps of a tiny model one or two.

Everything else is as in a process that a shell started: arguments, environment, working folder, session, exit
status; several processes of one training are told what torchrun would tell them. Tests that look at the
start of a training, or end one, start it as a user does instead.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

LIBRARIES = [
    "llava_ext.train",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
]
CONTEXT = multiprocessing.get_context("forkserver")


def run(
    module: str,
    argv: Sequence[str],
    log: Path,
    cwd: Path,
    environment: Mapping[str, str],
    timeout: float,
    processes: int = 1,
) -> int:
    """Runs ``python -m module`` in one or several processes; returns the exit status, -9 after ``timeout``
    seconds.
    """
    _start_server(environment)
    process = CONTEXT.Process(target=_main, args=(module, list(argv), log, cwd, dict(environment), processes))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        os.killpg(process.pid, 9)
        process.join()
    return process.exitcode


def _start_server(environment: Mapping[str, str]) -> None:
    """Once a test process, with the environment that libraries read while they load."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        CONTEXT.set_forkserver_preload(LIBRARIES)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _main(
    module: str, argv: list[str], log: Path, cwd: Path, environment: dict[str, str], processes: int
) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.argv = [module, *argv]
    if processes > 1:
        _become_one_of(processes, "--deepspeed" in argv)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _become_one_of(processes: int, deepspeed: bool) -> None:
    """Returns in every process of the training; the one that was there is their torchrun."""
    from torch.distributed import TCPStore

    if deepspeed:  # loads for seconds, and in all of them
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    for rank in range(processes):
        if os.fork() == 0:
            told = shared | {"RANK": rank, "LOCAL_RANK": rank}
            os.environ.update({name: str(value) for name, value in told.items()})
            return
    statuses = [os.wait()[1] for _ in range(processes)]
    os._exit(int(any(statuses)))
