"""Trainings that begin in a process whose libraries are loaded: torch and transformers cost eight seconds of
processor time, the steps of a tiny model one or two.

One server for all test processes of a run forks them, and a second one, itself forked from it, those that
need DeepSpeed. Everything else is as in a process that a shell started: arguments, environment, working
folder, session, exit status; several processes of one training are told what torchrun would tell them. What
of a training comes before its libraries are loaded is tested by starting it as a user does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from filelock import FileLock

REPOSITORY = Path(__file__).parents[2]
# Set by the process that began the tests: its pid and a folder for the servers' sockets.
FOLDER, OWNER = "LLAVA_TESTS_FOLDER", "LLAVA_TESTS_OWNER"
LIBRARIES = {
    "plain": [
        "llava_ext.train",
        "transformers.models.clip.modeling_clip",
        "transformers.models.llama.modeling_llama",
        "transformers.models.llava.modeling_llava",
    ],
    "deepspeed": ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"],
}


def run(
    module: str,
    argv: Sequence[str],
    log: Path,
    cwd: Path,
    environment: Mapping[str, str],
    timeout: float,
    processes: int = 1,
    deepspeed: bool = False,
    before: Callable[[], object] | None = None,
) -> int:
    """Runs ``python -m module``, or a file of that name, in one or several processes; returns the exit
    status, -9 after ``timeout`` seconds.

    Args:
        deepspeed: whether DeepSpeed is loaded too.
        before: called in the new process, or in the one that forks several, ahead of the module.
    """
    order = module, list(argv), log, cwd, dict(environment), processes, before
    with _order(order, "deepspeed" if deepspeed else "plain", environment) as answers:
        pid = answers.recv()
        if not answers.poll(timeout):
            os.killpg(pid, signal.SIGKILL)
        return answers.recv()


@contextlib.contextmanager
def servers() -> Iterator[None]:
    """Where no tests run: while it lasts, processes can be ordered here."""
    if FOLDER in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="warm-", ignore_cleanup_errors=True) as folder:
        os.environ |= {FOLDER: folder, OWNER: str(os.getpid())}
        try:
            yield
        finally:
            del os.environ[FOLDER], os.environ[OWNER]


def _order(order: tuple[Any, ...], name: str, environment: Mapping[str, str]) -> Connection:
    path = Path(os.environ[FOLDER]) / name
    with FileLock(f"{path}.lock"):
        if not path.exists():
            _start_server(path, environment)
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    answers = Connection(client.detach())
    answers.send(order)
    return answers


def _start_server(path: Path, environment: Mapping[str, str]) -> None:
    """Returns when it can be connected to; it answers when its libraries are loaded."""
    found = {**environment, FOLDER: os.environ[FOLDER], OWNER: os.environ[OWNER]}
    log = path.with_suffix(".log")
    if path.name == "plain":
        command = [sys.executable, "-m", __name__, str(path)]
        with log.open("wb") as stream:
            subprocess.Popen(
                command, cwd=REPOSITORY, env=found, stdout=stream, stderr=stream, start_new_session=True
            )
    else:
        found["DS_ACCELERATOR"] = "cpu"
        order = __name__, [str(path)], log, REPOSITORY, found, 1, None
        _order(order, "plain", environment).close()
    end = time.monotonic() + 600
    while not path.exists():
        assert time.monotonic() < end, f"no server: {log.read_text()[-2000:]}"
        time.sleep(0.02)


def serve(path: Path) -> None:
    """Loads the libraries and forks whatever is ordered until the tests have ended. Returns in the processes
    that are to end.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(64)
    for library in LIBRARIES[path.name]:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()  # what is shared with the forked processes stays so
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    listener.settimeout(2)
    while path.exists() and Path(f"/proc/{os.environ[OWNER]}").exists():
        with contextlib.suppress(TimeoutError):
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                return _answer(connection)
            connection.close()
    return None


def _answer(client: socket.socket) -> None:
    """Forks what is ordered, tells its pid, and its status when it has ended."""
    client.setblocking(True)
    answers = Connection(client.detach())
    module, argv, log, cwd, environment, processes, before = answers.recv()
    pid = os.fork()
    if pid == 0:
        answers.close()
        return _become(module, argv, log, cwd, environment, processes, before)
    with contextlib.suppress(ConnectionError):  # of a server nobody waits for the end
        answers.send(pid)
        answers.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def _become(
    module: str,
    argv: list[str],
    log: Path,
    cwd: Path,
    environment: dict[str, str],
    processes: int,
    before: Callable[[], object] | None,
) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.argv = [module, *argv]
    if before is not None:
        before()
    if processes > 1:
        _become_one_of(processes)
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _become_one_of(processes: int) -> None:
    """Returns in every process of the training; the one that was there is their torchrun."""
    from torch.distributed import TCPStore

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


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
