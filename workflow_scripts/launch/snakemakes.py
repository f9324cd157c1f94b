"""Which Snakemakes work in a folder: each main one leaves a record, so that a lock has a holder.

Snakemake's own locks say nothing of who has them. Here every main Snakemake is known by machine, boot,
process and Slurm job: locks of the dead are removed before Snakemake looks at them, locks of the living are
explained, and no training is taken from a Snakemake that lives.
"""

from __future__ import annotations

import atexit
import getpass
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow_scripts.io import UserError, read_json, write_json
from workflow_scripts.launch import slurm
from workflow_scripts.launch.processes import process_start

RECORDS = Path(".snakemake/llava")
LOCKS = Path(".snakemake/locks")
# Names the record of the Snakemake that a job belongs to; jobs of Slurm inherit it too.
VARIABLE = "LLAVA_SNAKEMAKE"
# Who lives says so often.
BEAT_S = 20.0


@dataclass(frozen=True)
class Record:
    """A main Snakemake, as it described itself when it started."""

    path: Path
    content: dict[str, Any]

    @property
    def who(self) -> str:
        """Who and where, for messages."""
        found = self.content
        job = f", Slurm job {found['job']}" if found["job"] else ""
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(found["since"]))
        return f"{found['user']}'s Snakemake (process {found['pid']} on {found['host']}{job}, since {since})"

    @property
    def how_to_end(self) -> str:
        """The command that ends it, its jobs saving first."""
        if self.content["job"]:
            return f"scancel --batch --signal=INT {self.content['job']}"
        return f"kill -INT {self.content['pid']} on {self.content['host']}"


def describe_myself() -> dict[str, Any]:
    """What tells this process from all others, on this machine and elsewhere."""
    return {
        "user": getpass.getuser(),
        "host": socket.gethostname(),
        "machine": _line("/etc/machine-id"),
        "boot": _line("/proc/sys/kernel/random/boot_id"),
        "processes": Path("/proc/self/ns/pid").stat().st_ino,
        "pid": os.getpid(),
        "start": process_start(os.getpid()),
        "job": slurm.job_id(),
        "since": time.time(),
    }


def _line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def is_alive(content: dict[str, Any]) -> bool | None:
    """Whether a Snakemake lives: by its process on the same machine, else by its Slurm job; None where nobody
    can say.
    """
    me = describe_myself()
    if all(content[key] == me[key] for key in ("boot", "processes")):
        return process_start(content["pid"]) == content["start"]
    same_machine = content["machine"] and all(content[key] == me[key] for key in ("machine", "host"))
    if same_machine and content["boot"] != me["boot"]:
        return False
    return slurm.job_is_alive(content["job"], tries=1) if content["job"] else None


def lives(record: Record, silence_s: float) -> bool:
    """The same; one that nobody can ask lives when its record shows it within ``silence_s`` seconds."""
    alive = is_alive(record.content)
    if alive is not None:
        return alive
    print(f"watching for {silence_s:g} s whether {record.who} lives", flush=True)
    before, deadline = _touched(record.path), time.monotonic() + silence_s
    while time.monotonic() < deadline:
        time.sleep(min(2.0, silence_s / 4))
        if _touched(record.path) != before:
            return _touched(record.path) is not None
    return False


def _touched(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def mine() -> str:
    """The name of the record of the Snakemake that this process belongs to; empty where there is none."""
    return os.environ.get(VARIABLE, "")


def read_record(name: str) -> Record | None:
    """The record of that name in the working folder; None when its Snakemake has ended in order."""
    path = RECORDS / name
    try:
        return Record(path, read_json(path)) if name else None
    except UserError:
        return None


def all_records() -> list[Record]:
    """All main Snakemakes of the working folder that have not ended in order, but for this one."""
    names = sorted(path.name for path in RECORDS.glob("*.json") if path.name != mine())
    return [record for name in names if (record := read_record(name))]


def enter(unlock: bool) -> None:
    """Registers this Snakemake in the working folder and removes the locks of dead ones. To be called by main
    Snakemakes that are not in a dry run, before Snakemake looks at its locks.

    Raises:
        UserError: ``unlock``, and somebody lives who works here.
    """
    if not unlock:
        _register()
    others = all_records()
    alive = {record.path: is_alive(record.content) for record in others}
    living = [record for record in others if alive[record.path]]
    unknown = [record for record in others if alive[record.path] is None]
    if unlock and living:
        raise UserError(f"--unlock: {_held_by(living)}")
    if unlock or not (living or unknown):
        _forget(others, locks=not unlock)
    else:
        _explain_lock([*living, *unknown], bool(living))


def _register() -> None:
    RECORDS.mkdir(parents=True, exist_ok=True)
    content = describe_myself()
    path = RECORDS / f"{content['host']}-{content['pid']}-{content['start']}.json"
    write_json(path, content)
    os.environ[VARIABLE] = path.name
    atexit.register(path.absolute().unlink, missing_ok=True)


def beat() -> None:
    """Shows from now on that this Snakemake lives, for machines that cannot ask it."""

    def touch() -> None:
        pause = threading.Event()
        while not pause.wait(BEAT_S):
            try:
                os.utime(RECORDS / mine())
            except OSError:
                continue

    threading.Thread(target=touch, name="sign of life", daemon=True).start()


def _forget(dead: Iterable[Record], locks: bool) -> None:
    """Removes the records of the dead and, with ``locks``, what they have locked."""
    for record in dead:
        if locks and any(LOCKS.glob("*.lock")):
            print(f"{record.who} has died; its lock is removed", file=sys.stderr, flush=True)
            shutil.rmtree(LOCKS)
        record.path.unlink(missing_ok=True)


def _held_by(living: Iterable[Record]) -> str:
    listed = " and ".join(record.who for record in living)
    ends = " and ".join(record.how_to_end for record in living)
    return (
        f"{listed} works in {Path.cwd()}; wait for its end, or end it first"
        f" ({ends}: its jobs save), and start the same command again"
    )


def _explain_lock(holders: list[Record], living: bool) -> None:
    """Has Snakemake say who holds the folder, if it finds what it wants to make locked."""
    from snakemake import exceptions

    text = _held_by(holders)
    if not living:
        text = (
            f"{' and '.join(record.who for record in holders)} has locked {Path.cwd()}, and this machine"
            " cannot see whether it lives. Look there; if it has died, remove its lock with --unlock"
        )

    class Held(exceptions.LockException):
        """Snakemake's error, with who and where instead of a guess."""

        def __init__(self) -> None:
            exceptions.WorkflowError.__init__(self, f"error: the folder is locked: {text}")

    exceptions.LockException = Held
