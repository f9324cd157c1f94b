"""One process writes a file at a time, and one host has few connections, in all of a working folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from workflow_scripts.acquire.patience import Patience
from workflow_scripts.acquire.stopping import pause
from workflow_scripts.acquire.voice import Voice
from workflow_scripts.disk import size_text

LOOK_S = 0.2


def _lock(stream: IO[str]) -> bool:
    """Takes the lock of an open file; False when another process has it."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems know no locks
        pass
    return True


@contextlib.contextmanager
def only_one(target: Path, part: Path, voice: Voice) -> Iterator[None]:
    """Waits while another process fetches this file: one that an earlier Snakemake left, for instance."""
    with target.with_name(f".{target.name}.lock").open("a+") as stream:
        waited = False
        while not _lock(stream):
            stream.seek(0)
            who = stream.read(200).strip() or "another process"
            there = part.stat().st_size if part.exists() else 0
            voice.what = f"waiting for {who}, which is fetching it ({size_text(there)} are here)"
            if not waited:
                voice.set_activity(voice.what)
                voice.say(voice.what)
                waited = True
            pause(LOOK_S)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        yield


@contextlib.contextmanager
def host_slot(url: str, patience: Patience, voice: Voice | None = None) -> Iterator[float]:
    """Waits until fewer than ``per_host`` downloads use this host; gives the seconds that it took."""
    if patience.hosts is None:
        yield 0.0
        return
    patience.hosts.mkdir(parents=True, exist_ok=True)
    host = re.sub(r"[^\w.-]", "_", urlsplit(url).netloc.rpartition("@")[2])
    begin = time.monotonic()
    while True:
        for number in range(patience.per_host):
            with (patience.hosts / f"{host}.{number}").open("w") as stream:
                if _lock(stream):
                    yield time.monotonic() - begin
                    return
        if voice is not None:
            voice.what = f"waiting for a free connection to {host}"
        pause(LOOK_S)
