"""The history of a training's attempts, one JSON object a line, and the end of those that lead nowhere."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from workflow_scripts.io import UserError, write_json
from workflow_scripts.launch import slurm

ATTEMPTS = "attempts.jsonl"
REFUSAL = "refused.json"
REQUEUED_IN_VAIN = 10


def read_attempts(state: Path) -> list[dict[str, Any]]:
    """All attempts, each with what is known about its end; half-written lines are left out."""
    found: dict[int, dict[str, Any]] = {}
    try:
        lines = (state / ATTEMPTS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found.setdefault(row["attempt"], {}).update(row)
    return list(found.values())


def append(state: Path, row: Mapping[str, Any]) -> None:
    """Adds one line, in one write."""
    line = json.dumps(row, sort_keys=True) + "\n"
    with (state / ATTEMPTS).open("ab", buffering=0) as stream:
        stream.write(line.encode())
        os.fsync(stream.fileno())


def saved_step(state: Path) -> int:
    """The step of the newest complete checkpoint, 0 when there is none."""
    steps = [0]
    for folder in state.glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdigit() and (folder / "complete.json").is_file():
            steps.append(int(number))
    return max(steps)


def split_requeued(
    attempts: list[dict[str, Any]], job: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Attempts that ended by themselves, and those that Slurm ended and put back (the next one has the
    same job).
    """
    following = [row.get("job") for row in attempts[1:]] + [job] * bool(attempts)
    ended: list[dict[str, Any]] = []
    requeued: list[dict[str, Any]] = []
    for row, next_job in zip(attempts, following, strict=True):
        by_slurm = "outcome" not in row and row.get("job") and row["job"] == next_job
        (requeued if by_slurm else ended).append(row)
    return ended, requeued


def refuse_if_stuck(
    state: Path, attempts: list[dict[str, Any]], allowed: int, cause: str = "", mend: str = ""
) -> None:
    """Raises UserError when the last ``allowed`` attempts of the same ``cause`` failed without saving
    anything new.

    ``cause``: a digest of settings and code; when it changes, the count starts again. ``mend``: what else
    starts it again. Preemptions are no fault of the training; of them `REQUEUED_IN_VAIN` times as many are
    let pass.
    """
    step = saved_step(state)
    same = [row for row in attempts if row.get("cause", cause) == cause]
    ended, requeued = split_requeued(same, slurm.job_id())
    for rows, limit in ((ended, allowed), (requeued, allowed * REQUEUED_IN_VAIN)):
        last = rows[-limit:]
        if len(last) == limit and all(_is_in_vain(row, step) for row in last):
            raise UserError(_stuck(state, last, step, mend))


def _is_in_vain(row: Mapping[str, Any], step: int) -> bool:
    return row.get("outcome", "killed") != "finished" and row.get("from_step") == step


def _stuck(state: Path, last: Sequence[Mapping[str, Any]], step: int, mend: str) -> str:
    causes = ", ".join(str(row.get("outcome", "killed")) for row in last[-5:])
    return (
        f"{state}: the last {len(last)} attempts ({causes}) saved nothing beyond step {step}, so no further"
        f" one is started. The last one's log: {state / last[-1].get('log', '')}. Mend the cause (memory?"
        " time limit or the time between preemptions shorter than save_steps?) and start again: a changed"
        f" setting or code starts the count again; {mend}"
    )


def read_refusal(state: Path) -> dict[str, Any]:
    """What the checks before the last start refused; empty where they refused nothing."""
    try:
        found = json.loads((state / REFUSAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def recorded_refusal(state: Path) -> Iterator[None]:
    """Leaves a UserError of the checks before a start in `refused.json`, until the next attempt begins."""
    try:
        yield
    except UserError as error:
        place = {"time": time.time(), "host": socket.gethostname(), "job": slurm.job_id()}
        with suppress(OSError):  # what went wrong first is what is said
            write_json(state / REFUSAL, {**place, "error": str(error)})
        raise


def begin(
    state: Path, attempts: list[dict[str, Any]], host: str | None = None, cause: str = ""
) -> dict[str, Any]:
    """Records the start of an attempt and returns its row; the log that the row names exists from then on."""
    number = max((row["attempt"] for row in attempts), default=0) + 1
    log = state / "logs" / f"attempt-{number:03d}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    row = {
        "attempt": number,
        "started": time.time(),
        "host": host or socket.gethostname(),
        "job": slurm.job_id(),
        "from_step": saved_step(state),
        "log": str(log.relative_to(state)),
        "cause": cause,
    }
    append(state, row)
    (state / REFUSAL).unlink(missing_ok=True)
    return row


def end(state: Path, row: Mapping[str, Any], outcome: str) -> None:
    """Records how an attempt ended: `finished`, `interrupted` (saved, to be continued), `verdict` or
    `failed (STATUS)`.
    """
    append(
        state,
        {"attempt": row["attempt"], "ended": time.time(), "outcome": outcome, "to_step": saved_step(state)},
    )
