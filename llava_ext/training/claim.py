"""One training a folder: who holds it, and whether it was taken over."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import Any

from ..errors import NoVerdict, say

LOCK = ".training.lock"


# Who holds the lock, in a file of its own: a process loses a lock when it closes any descriptor of the locked
# file.
HOLDER = ".training.holder"


_held: list[Any] = []


def claim(output_dir: Path, patience_s: float = 150.0) -> None:
    """Makes this process the only training in ``output_dir`` for as long as it lives.

    The lock goes with the process, also after kill -9; that of a machine that has died, when the file
    server's lease ends (NFS: 90 s). A file system without locks is used as it is.

    Raises:
        NoVerdict: another living process holds it, after waiting ``patience_s`` for it to end.
    """
    stream = (output_dir / LOCK).open("a+", encoding="utf-8")
    end = time.monotonic() + patience_s
    said = False
    while True:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() > end:
                raise NoVerdict(
                    f"{output_dir}: another training runs here ({holder(output_dir)}); stop that one"
                ) from None
            if not said:
                say(f"{output_dir}: held by {holder(output_dir)}; waiting up to {patience_s:g} s for its end")
                said = True
            time.sleep(0.5)
        except OSError as error:
            say(
                f"{output_dir}: no locks here ({error}): see to it yourself that no second training starts"
                " in it"
            )
            break
    _held.append(stream)
    temporary = output_dir / f"{HOLDER}.{os.getpid()}.tmp"
    temporary.write_text(_me(), encoding="utf-8")
    temporary.replace(output_dir / HOLDER)


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def holder(output_dir: Path) -> str:
    """The process that has claimed ``output_dir``, in words; empty where none has."""
    try:
        return (output_dir / HOLDER).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def check_claim(output_dir: Path) -> None:
    """Stops this process when the training was given to another one: a machine that was cut off for a while,
    say.

    Raises:
        NoVerdict: another process has claimed ``output_dir`` since; nothing must be written there any more.
    """
    owner = holder(output_dir)
    if owner and owner != _me():
        raise NoVerdict(
            f"{output_dir}: {owner} has taken this training over; this process ({_me()}) stops without"
            " writing"
        )


def is_free(output_dir: Path) -> bool:
    """Whether this process holds ``output_dir``, or nobody who lives does."""
    if _held:
        return holder(output_dir) in ("", _me())
    try:
        with (output_dir / LOCK).open("a+", encoding="utf-8") as stream:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True  # a file system without locks
    return True
