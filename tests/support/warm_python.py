"""A Python whose libraries are loaded, in place of the real one where the real Snakefile runs and nothing is
about processes: a Snakemake start costs five seconds of processor time, each of a dozen steps eight more.

``python()`` gives a program that is called as Python is. For the modules of a run it asks a server, one for
all test processes, to fork; arguments, environment, working folder, umask, files, signals and exit status are
as of a process that it started. Anything else, other code than the server's, what is to run ahead of it
(held.py), and a server that does not answer get the real Python. What libraries read from the environment
while they load is the server's, limits (`ulimit`) too, and all of its children hash with one seed: runs that
are about the start or the end of processes begin as users begin them.

This file is both sides: the program (started without site-packages, in 20 ms) and the server.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "llava_ext.train",
    "snakemake",
    "torch.distributed.run",
    "workflow_scripts.prepare_model",
    "workflow_scripts.step",
)
LIBRARIES = (
    "llava_ext.train",
    "snakemake.cli",
    "torch.distributed.run",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "workflow_scripts.plan.plan",
)
PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def python(code: Path = ROOT) -> str:
    """The path of the program; its server lives as long as the tests do.

    ``code`` is the folder whose packages are loaded, this one or a clone: it must not change any more.
    """
    from filelock import FileLock

    owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    folder = Path(tempfile.gettempdir()) / f"warm-python-{os.getuid()}-{owner}"
    if code != ROOT:
        folder = folder.with_name(f"{folder.name}-{zlib.crc32(os.fsencode(code)):08x}")
    folder.mkdir(mode=0o700, exist_ok=True)
    program = folder / "python"
    with FileLock(folder / "lock"):
        if not program.exists():
            words = f"{sys.executable} -SE {__file__} {sys.executable} {folder}/socket {code}"
            program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
            program.chmod(0o755)
            _start_server(program, folder, owner, code)
    return str(program)


def _start_server(program: Path, folder: Path, owner: int, code: Path) -> None:
    """Returns when the server answers: what was started ends then, and leaves a child behind."""
    with (folder / "log").open("ab") as log:
        done = subprocess.run(
            [sys.executable, __file__, "serve", str(program), str(owner), str(code)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            check=False,
        )
    assert done.returncode == 0, (folder / "log").read_text()


# -- the program ------------------------------------------------------------------------------------------


def ask(real: str, address: str, code: str, arguments: list[str]) -> None:
    """Has the server run these arguments of Python and ends as they do; or becomes the real Python."""
    words = arguments[1:] if arguments[:1] == ["-u"] else arguments
    path = os.environ.get("PYTHONPATH")
    ours = words[1:2] == ["snakemake"] if path is None else set(path.split(":")) == {code}
    connection = socket.socket(socket.AF_UNIX)
    try:
        if words[:1] != ["-m"] or words[1] not in MODULES or not ours:
            raise OSError("not one of the modules of a run")
        connection.connect(address)
    except OSError:
        os.execv(real, [real, *arguments])
    ignored = [number for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
    os.umask(mask := os.umask(0))
    request = {"argv": words[1:], "cwd": str(Path.cwd()), "env": dict(os.environ), "umask": mask}
    request["ignored"] = ignored
    content = json.dumps(request).encode()
    socket.send_fds(connection, [struct.pack("I", len(content))], [0, 1, 2])
    connection.sendall(content)
    for number in set(PASSED_ON) - set(ignored):
        signal.signal(number, lambda number, _: connection.send(bytes([number])))
    answer = connection.recv(4)
    status = struct.unpack("i", answer)[0] if len(answer) == 4 else 1
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


# -- the server -------------------------------------------------------------------------------------------


def serve(program: str, owner: int, code: str) -> str:
    """Loads the libraries and answers until the owner has ended. Returns in each child: the module to run."""
    import gc
    import importlib
    import shutil

    sys.executable = program  # what a step starts asks the server too
    sys.path[0] = code
    for name in LIBRARIES:
        importlib.import_module(name)
    del sys.path[0]
    gc.freeze()
    folder = Path(program).parent
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    watched = os.pidfd_open(owner)
    while watched not in select.select([listener, watched], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            os.close(watched)
            return _attend(connection)
        connection.close()
    shutil.rmtree(folder)
    raise SystemExit


def _attend(connection: socket.socket) -> str:
    """One request: returns in the process that runs it, while its parent passes signals on."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, files, _, _ = socket.recv_fds(connection, 4, 3)
    stream = connection.makefile("rb")
    content = stream.read(struct.unpack("I", head)[0])
    child = os.fork()
    if child == 0:
        stream.close()
        connection.close()
        return _become(json.loads(content), files)
    for number in files:
        os.close(number)
    ended = os.pidfd_open(child)
    while ended not in select.select([connection, ended], [], [])[0]:
        told = connection.recv(64)
        for number in told or [signal.SIGKILL]:  # nothing is told where who asked has been killed
            os.kill(child, number)
        if not told:
            break
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        connection.sendall(struct.pack("i", status))
    finally:
        os._exit(0)


def _become(request: dict, files: list[int]) -> str:
    """Turns this process into the one that was asked for; the module that it is to run."""
    import torch

    os.setsid()
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["env"])
    for place, number in enumerate(files):
        os.dup2(number, place)
        os.close(number)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", 1, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, closefd=False, errors="backslashreplace")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    path = os.environ.get("PYTHONPATH", "")
    sys.path[:0] = [request["cwd"], *path.split(":")] if path else [request["cwd"]]
    sys.argv = request["argv"]
    return request["argv"][0]


if __name__ == "__main__":
    if sys.argv[1] != "serve":
        ask(*sys.argv[1:4], sys.argv[4:])
    import runpy

    runpy.run_module(serve(sys.argv[2], int(sys.argv[3]), sys.argv[4]), run_name="__main__", alter_sys=True)
