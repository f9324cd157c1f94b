"""Starts one step of the workflow with a log: `python -m workflow_scripts.step --log FILE STEP ARGUMENTS...`.

What the step prints goes to the terminal and to the log. It stays one process, so that a signal to the job
reaches the step itself. After a failure the last line names the log.
"""

from __future__ import annotations

import gc
import importlib
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from workflow_scripts.io import Refusal
from workflow_scripts.secrets import redact

# What the last line says of a step that ended by a mistake which another attempt would meet again.
REPEATS = "and would fail so again"


def command(python: str, home: Path, setup: str = "", module: str = "workflow_scripts.step") -> str:
    """The shell command that starts a step (or another ``module``), to be followed by its arguments.

    ``home`` is the folder of the code, ``setup`` what the site wants to happen first. The step replaces the
    shell, so that Slurm's signals reach it.
    """
    path = f'export PYTHONPATH={shlex.quote(str(home))}"${{PYTHONPATH:+:$PYTHONPATH}}"; '
    script = shlex.quote(str(home / "workflow_scripts/setup.sh"))
    before = f"setup={shlex.quote(setup)}; . {script}; " if setup.strip() else ""
    return f"{before}{path}exec {shlex.quote(python)} -m {module}"


def _tee(log: Path) -> tuple[threading.Thread, int]:
    """Sends file descriptors 1 and 2 through a thread that copies them to the old stderr and to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    stream = log.open("ab", buffering=0)
    terminal = os.dup(2)
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    os.close(writing)

    def copy() -> None:
        # Either may fail, the terminal by going away, the log by a full disk; who writes must not be kept
        # waiting.
        while piece := os.read(reading, 1 << 16):
            for write in (partial(os.write, terminal), stream.write):
                with suppress(OSError):
                    write(piece)
        with suppress(OSError):
            stream.close()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread, terminal


def find_main(name: str) -> Callable[[list[str]], None]:
    """The door of a step: ``main`` in the module ``workflow_scripts.<name>`` or, where that is a room, in
    its ``step``.
    """
    module = f"workflow_scripts.{name}"
    loaded = importlib.import_module(module)
    if not hasattr(loaded, "main"):
        loaded = importlib.import_module(f"{module}.step")
    return loaded.main


def run_step(name: str, arguments: Sequence[str], log: Path) -> int:
    """Runs the step's ``main(arguments)`` and returns its exit status."""
    thread, terminal = _tee(log)
    status: int | str | None = 1
    outlook = ""
    try:
        find_main(name)(list(arguments))
        status = 0
    except SystemExit as stop:
        status = stop.code
        outlook = f" {REPEATS}" if isinstance(stop, Refusal) else ""
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        print(f"the step {name} was interrupted", file=sys.stderr)
    except BaseException:  # noqa: BLE001 - whatever it was, it belongs into the log
        print(redact(traceback.format_exc()), file=sys.stderr)
    sys.stdout.flush()  # what the step printed comes before what is said about it
    code = status if isinstance(status, int) else 0 if status is None else 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
    if code:
        print(f"the step {name} failed with status {code}{outlook}; its log: {log}", file=sys.stderr)
    sys.stderr.flush()
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    thread.join(timeout=5)
    return code


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: ``--log FILE STEP ARGUMENTS...``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) < 3 or arguments[0] != "--log":
        raise SystemExit("usage: python -m workflow_scripts.step --log FILE STEP [ARGUMENTS...]")
    gc.set_threshold(10_000)  # torch and transformers make objects by the million, and all of them stay:
    status = run_step(arguments[2], arguments[3:], Path(arguments[1]))
    gc.freeze()  # looking for garbage among them, now once more, takes a third of a short step's time
    raise SystemExit(status)


if __name__ == "__main__":
    main()
