"""Signals ahead of a time limit or a preemption: the trainer notes them and saves, its dataset workers go on
until then.

Loads nothing heavy, so that a training hears them from its first moment.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
received: list[int] = []


def install_handlers() -> None:
    """Notes SIGTERM and SIGUSR1 instead of dying from them. To be called early: a signal before the first
    step counts.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        signal.signal(number, _record)


def _record(number: int, frame: Any) -> None:
    if not received:
        os.write(
            2, f"llava_ext: got {signal.Signals(number).name}; saving at the end of this step\n".encode()
        )
    received.append(number)


@contextmanager
def blocked() -> Iterator[None]:
    """Processes that are started inside, and their threads, get no signal to the whole job from their
    first moment on.
    """
    resource_tracker.ensure_running()  # it would unblock them when it is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*SIGNALS, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_in_worker() -> None:
    """For dataset workers: Slurm signals every process of a job, and a batch that a worker owes is needed
    until the save.

    SIGTERM from the trainer itself still ends them: Python sends it to the workers that are left at its end,
    and waits. So does the trainer's death, which torch's own watch over the parent does not see where a fork
    server is the parent.
    """
    ignored = {signal.SIGUSR1, signal.SIGINT}
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    trainer = multiprocessing.parent_process()
    threading.Thread(target=_exit_with_trainer, args=(trainer,), name="signals", daemon=True).start()


def _exit_with_trainer(trainer: Any) -> None:
    """Ends this process when the trainer sends it SIGTERM, or soon after the trainer has died."""
    while trainer is not None and trainer.is_alive():
        heard = signal.sigtimedwait({signal.SIGTERM}, 5)
        if heard is not None and heard.si_pid == trainer.pid:
            break
    os._exit(0)
