"""One training, one owner: who computes a run, whether it is still alive, and how it is taken over.

After a crash of Snakemake its jobs go on; the same training is then started again while the old one runs. The
new one asks the old one to save, waits until it is gone, and continues from what it saved. Where nobody can
be asked (another machine without Slurm, or inside a container without its commands) a former owner that shows
no life is taken for dead. A training whose own Snakemake still lives is no orphan: it is left alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workflow_scripts.io import UserError, read_json, write_json
from workflow_scripts.launch import slurm, snakemakes
from workflow_scripts.launch.processes import process_start, signal_tree
from workflow_scripts.launch.snakemakes import BEAT_S

OWNER = "owner.json"
PATIENCE_S = 300.0
# Shared file systems show an owner's sign of life (every BEAT_S) within a minute or so.
SILENCE_S = 150.0


class Ownership:
    """The claim of this process on a state folder."""

    def __init__(self, state: Path, patience_s: float = PATIENCE_S) -> None:
        """``patience_s``: how long a former owner may take for its last save."""
        self.patience_s = patience_s
        self.path = state / OWNER
        self.mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start": process_start(os.getpid()),
            "job": slurm.job_id(),
            "snakemake": snakemakes.mine(),
            "trainer": None,
            "trainer_start": None,
        }
        self.released = threading.Event()

    def claim(self) -> None:
        """Becomes the owner, after the former one has saved and ended. Raises UserError when it can't be
        reached.
        """
        if self.path.is_file():
            other = read_json(self.path)
            if not self._is_me(other):
                self._take_over(other)
        write_json(self.path, self.mine)
        time.sleep(0.05)
        if not self._is_me(read_json(self.path)):
            raise UserError(
                f"{self.path}: two jobs started this training at the same time; the other one has it"
            )
        threading.Thread(target=self._beat, name="owner's heartbeat", daemon=True).start()

    def _beat(self) -> None:
        while not self.released.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def record_trainer(self, pid: int) -> None:
        """Notes the training process, which may outlive the launcher."""
        self.mine.update(trainer=pid, trainer_start=process_start(pid))
        write_json(self.path, self.mine)

    def release(self) -> None:
        """Gives the claim up, if it is still this process's."""
        self.released.set()
        if self.path.is_file() and self._is_me(read_json(self.path)):
            self.path.unlink(missing_ok=True)

    def _is_me(self, other: dict[str, Any]) -> bool:
        return all(other.get(key) == self.mine[key] for key in ("host", "pid", "start", "job"))

    def _take_over(self, other: dict[str, Any]) -> None:
        if reason := why_left_alone(self.path, SILENCE_S):
            raise UserError(reason)
        job = str(other.get("job") or "")
        if job and job != self.mine["job"]:
            self._take_over_job(job)
        elif other.get("host") == self.mine["host"]:
            for key in ("pid", "trainer"):
                self._end_local(other.get(key), other.get(f"{key}_start" if key == "trainer" else "start"))
        elif not job:
            self._wait_for_silence(f"process {other.get('pid')} on {other.get('host')}")

    def _take_over_job(self, job: str) -> None:
        alive = slurm.job_is_alive(job)
        if alive is None:
            self._wait_for_silence(f"Slurm job {job} (squeue does not answer here)")
        if alive:
            print(f"Slurm job {job} is still computing this training: asking it to save and end", flush=True)
            if not slurm.cancel(job, self.patience_s):
                raise UserError(
                    f"{self.path}: Slurm job {job} does not end; cancel it (scancel {job}) and start again"
                )

    def _wait_for_silence(self, who: str) -> None:
        """Goes on when the former owner shows no life; by watching, because the clocks of machines differ.

        Raises:
            UserError: it does.
        """
        print(f"{who} owned this training; watching for {SILENCE_S:g} s whether it lives", flush=True)
        before = self._signs_of_life()
        deadline = time.monotonic() + SILENCE_S
        while time.monotonic() < deadline:
            time.sleep(min(2.0, SILENCE_S / 4))
            if self._signs_of_life() != before:
                raise UserError(
                    f"{self.path}: {who} is still computing this training; end it there, or wait for its end"
                )

    def _signs_of_life(self) -> dict[Path, int]:
        """When the owner's record, the metrics and the logs were last written."""
        found = {}
        state = self.path.parent
        for path in (self.path, state / "metrics.jsonl", *sorted(state.glob("logs/*"))):
            with contextlib.suppress(OSError):
                found[path] = path.stat().st_mtime_ns
        return found

    def _end_local(self, pid: Any, start: Any) -> None:
        """Lets a process of this machine save and end."""
        if not isinstance(pid, int) or process_start(pid) is None or process_start(pid) != start:
            return
        print(f"process {pid} is still computing this training: asking it to save and end", flush=True)
        signal_tree(pid, signal.SIGTERM)
        deadline = time.monotonic() + self.patience_s
        while process_start(pid) == start:
            if time.monotonic() > deadline:
                signal_tree(pid, signal.SIGKILL)
                deadline += 30
            time.sleep(0.2)


def alive(owner: Mapping[str, Any]) -> bool | None:
    """Whether an owner computes: on this machine by its process, elsewhere by its Slurm job; None when
    nobody here can say.
    """
    if owner.get("host") == socket.gethostname():
        pairs = ((owner.get("pid"), owner.get("start")), (owner.get("trainer"), owner.get("trainer_start")))
        return any(
            isinstance(pid, int) and process_start(pid) == start and start is not None for pid, start in pairs
        )
    return slurm.job_is_alive(str(owner["job"]), tries=1) if owner.get("job") else None


def why_left_alone(path: Path, silence_s: float = 0.0) -> str | None:
    """Says that another living Snakemake is having the training of this owner's record done; None if not.

    One that this machine cannot ask is watched for ``silence_s`` seconds.
    """
    owner = read_json(path) if path.is_file() else {}
    record = snakemakes.read_record(str(owner.get("snakemake") or ""))
    if record is None or record.path.name == snakemakes.mine() or not alive(owner):
        return None
    if not snakemakes.lives(record, silence_s):
        return None
    return (
        f"{path}: {record.who} is having this training done, so it is left alone here; wait for its end and"
        " start again, which finds it finished, or end that Snakemake first"
    )
