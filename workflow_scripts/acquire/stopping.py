"""Work that ends at once when it is told to, whatever it waits for: a slow name server, a silent host, a
pause.

The work is done in threads that nobody has to wait for. What they wrote stays: a download that ends between
any two instructions is continued by the next one.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Generic, NoReturn, TypeVar, cast

from workflow_scripts.acquire.voice import say

T = TypeVar("T")
STOP = threading.Event()
"""Set when this process was told to end."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The process was told to end; nobody reads this message."""


class Task(Generic[T]):
    """A call in a thread of its own, at whose end the process need not wait."""

    def __init__(self, work: Callable[[], T], after: Callable[[], None] = lambda: None) -> None:
        self.value: T | None = None
        self.error: BaseException | None = None
        self.work, self.after = work, after
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.value = self.work()
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            self.error = error
        finally:
            self.after()

    def result(self) -> T:
        """What the call returned; raises what it raised."""
        if self.error is not None:
            raise self.error
        return cast(T, self.value)


def pause(seconds: float) -> None:
    """Sleeps, and raises :class:`Stopped` as soon as the process is told to end."""
    if STOP.wait(max(0.0, seconds)):
        raise Stopped


def until_signalled(work: Callable[[], T]) -> T:
    """Returns ``work()``, or ends the process with status 128 + the signal's number on SIGINT and SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        return work()
    told: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        told.append(number)

    former = {number: signal.signal(number, on_signal) for number in SIGNALS}
    waiting = Task(work)
    try:
        while waiting.thread.is_alive() and not told:
            waiting.thread.join(0.1)
        if told:
            _end(told[0], waiting)
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_IGN if told else handler)
    return waiting.result()


def _end(number: int, task: Task[T]) -> NoReturn:
    STOP.set()
    task.thread.join(0.5)  # most end now; who is stuck in a name server's answer is left behind
    say(
        f"stopped by {signal.Signals(number).name}; what was fetched is kept, and the same command goes on"
        " from it"
    )
    raise SystemExit(128 + number)


def gather(work: Sequence[Callable[[], T]], at_a_time: int) -> list[Task[T]]:
    """Does all of ``work``, ``at_a_time``, to the end even if some of it fails."""
    tasks: list[Task[T]] = []
    slots = threading.Semaphore(at_a_time)
    for item in work:
        while not slots.acquire(timeout=0.1):
            pause(0)
        tasks.append(Task(item, slots.release))
    for task in tasks:
        while task.thread.is_alive():
            task.thread.join(0.1)
            pause(0)
    return tasks
