"""Shows what the trainings are doing, from their folders alone: `python -m workflow_scripts.status [--watch]`.

One line a training: run, state, step, loss, tokens a second, time left, attempts, processes, last saved step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workflow_scripts.io import UserError, read_json, user_errors
from workflow_scripts.launching.attempts import read_attempts, saved_step
from workflow_scripts.launching.ownership import OWNER, alive

TAIL = 1 << 16


@dataclass(frozen=True)
class Status:
    """One training, as its folder shows it."""

    stage: str
    run: str
    state: str
    step: int
    steps: int | None
    loss: float | None
    tokens_per_s: float | None
    eta_s: float | None
    attempts: int
    processes: int
    saved_step: int
    where: str
    folder: str


def last_metrics(path: Path) -> list[dict[str, Any]]:
    """The last rows of `metrics.jsonl`, read from the end; a half-written last line is left out."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - TAIL))
            lines = stream.read().decode("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines[1:] if size > TAIL else lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def total_steps(folder: Path, spec: dict[str, Any]) -> int | None:
    """Steps of the whole training: from the recipe, or from the state that the trainer saved."""
    steps = spec["recipe"].get("max_steps")
    if steps:
        return int(steps)
    for path in sorted(folder.glob("checkpoint-*/trainer_state.json")):
        return int(read_json(path)["max_steps"])
    rows = last_metrics(folder / "metrics.jsonl")
    epochs = spec["recipe"].get("epochs")
    if rows and epochs and rows[-1].get("epoch"):
        return round(rows[-1]["step"] * epochs / rows[-1]["epoch"])
    return None


def read_status(folder: Path) -> Status:
    """What the state folder ``runs/<stage>/<run>/<key>`` shows."""
    spec = read_json(folder / "spec.json")["spec"]
    rows = last_metrics(folder / "metrics.jsonl")
    result = read_json(folder / "train_result.json") if (folder / "train_result.json").is_file() else {}
    owner = read_json(folder / OWNER) if (folder / OWNER).is_file() else {}
    attempts = read_attempts(folder)
    state = _state(result, owner, attempts)
    step = int(rows[-1]["step"]) if rows else int(result.get("step", 0))
    steps = total_steps(folder, spec)
    compute = spec["compute"]
    return Status(
        stage=spec["stage"],
        run=spec["run"],
        state=state,
        step=step,
        steps=steps,
        loss=rows[-1].get("loss") if rows else None,
        tokens_per_s=rows[-1].get("tokens_per_s") if rows else None,
        eta_s=_eta(rows, steps) if state == "running" else None,
        attempts=len(attempts),
        processes=compute["nodes"] * (compute["processes_per_node"] or max(1, compute["gpus_per_node"])),
        saved_step=int(result["step"]) if state == "finished" else saved_step(folder),
        where=f"job {owner['job']}" if owner.get("job") else str(owner.get("host", "")),
        folder=str(folder),
    )


def _state(result: dict[str, Any], owner: dict[str, Any], attempts: list[dict[str, Any]]) -> str:
    if result.get("status") == "finished":
        return "finished"
    if owner and alive(owner):
        return "running"
    if not attempts:
        return "not started"
    outcome = attempts[-1].get("outcome")
    if outcome is None:
        return "killed"
    return "interrupted" if outcome == "interrupted" else "failed"


def _eta(rows: list[dict[str, Any]], steps: int | None) -> float | None:
    """Seconds to the end at the pace of the last rows."""
    if steps is None or len(rows) < 2:
        return None
    recent = rows[-50:]
    passed, seconds = recent[-1]["step"] - recent[0]["step"], recent[-1]["time"] - recent[0]["time"]
    return (steps - recent[-1]["step"]) * seconds / passed if passed > 0 and seconds > 0 else None


def all_statuses(root: Path) -> list[Status]:
    """All trainings below the working folder ``root``, newest last."""
    folders = [
        path.parent for stage in ("pretrain", "finetune") for path in root.glob(f"runs/{stage}/*/*/spec.json")
    ]
    folders.sort(key=lambda folder: (folder / "spec.json").stat().st_mtime)
    return [read_status(folder) for folder in folders]


def duration(seconds: float | None) -> str:
    """`3:05:09`, or nothing."""
    if seconds is None:
        return ""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


HEAD = f"{'stage':<9} {'run':<34} {'state':<12} {'step':>13} {'loss':>8} {'tok/s':>8} {'left':>9} {'try':>3} {'proc':>4} {'saved':>7} where"


def table(statuses: Sequence[Status]) -> str:
    """The statuses as text, one line each."""
    lines = [HEAD]
    for item in statuses:
        step = f"{item.step}/{item.steps}" if item.steps else str(item.step)
        loss = "" if item.loss is None else f"{item.loss:.4f}"
        speed = "" if item.tokens_per_s is None else f"{item.tokens_per_s:.0f}"
        lines.append(
            f"{item.stage:<9} {item.run:<34} {item.state:<12} {step:>13} {loss:>8} {speed:>8} "
            f"{duration(item.eta_s):>9} {item.attempts:>3} {item.processes:>4} {item.saved_step:>7} {item.where}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table once, again and again, or as JSON."""
    parser = argparse.ArgumentParser(prog="python -m workflow_scripts.status", description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path(), help="the working folder")
    parser.add_argument(
        "--watch", type=float, nargs="?", const=5.0, metavar="SECONDS", help="again every so many seconds"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a training")
    options = parser.parse_args(argv)
    with user_errors():
        if not (options.directory / "runs").is_dir():
            raise UserError(
                f"{options.directory.absolute()}: no folder runs/ here; give the working folder with --directory"
            )
        while True:
            found = all_statuses(options.directory)
            text = "\n".join(json.dumps(asdict(item)) for item in found) if options.json else table(found)
            print(("\033[2J\033[H" if options.watch and sys.stdout.isatty() else "") + text, flush=True)
            if not options.watch:
                return
            time.sleep(options.watch)


if __name__ == "__main__":
    main()
