"""What a run folder says of its training."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from workflow_scripts.io import UserError, read_json
from workflow_scripts.launch.attempts import REFUSAL, read_attempts, saved_step
from workflow_scripts.launch.ownership import OWNER, alive
from workflow_scripts.launch.verdicts import ENDED, STATUS, read_end, read_verdict
from workflow_scripts.manifests import origin_of
from workflow_scripts.stages import STAGES

TAIL = 1 << 16


# A training whose machine can't be asked counts as running while it wrote something so recently.
FRESH_S = 900.0


# What a library raises; torchrun's own summary says only that some process failed.
RAISED = re.compile(r"^(?!.*ChildFailedError)(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*")


@dataclass(frozen=True)
class Status:
    """One training, as its folder shows it."""

    stage: str
    run: str
    state: str
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    tflop_per_s: float | None = None
    peak_share: float | None = None
    data_wait_share: float | None = None
    eta_s: float | None = None
    attempts: int = 0
    processes: int = 0
    saved_step: int = 0
    where: str = ""
    folder: str = ""
    gpus: str = ""
    idle_s: float | None = None
    experiments: list[str] = field(default_factory=list)
    reason: str = ""
    log: str = ""


def _tail(path: Path) -> list[str]:
    """The last whole lines of a file; none where it does not exist."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - TAIL))
            lines = stream.read().decode("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return lines[1:] if size > TAIL else lines


def last_metrics(path: Path) -> list[dict[str, Any]]:
    """The last rows of `metrics.jsonl`, read from the end; a half-written last line is left out."""
    rows = []
    for line in _tail(path):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def _content(path: Path) -> dict[str, Any]:
    """A small JSON file; empty where it is absent, vanishes meanwhile, or is damaged."""
    try:
        found = read_json(path)
    except (UserError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def total_steps(folder: Path, spec: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> int | None:
    """Steps of the whole training: from the recipe, or from the state that the trainer saved."""
    steps = spec["recipe"].get("max_steps")
    if steps:
        return int(steps)
    for path in sorted([*folder.glob("checkpoint-*/trainer_state.json"), folder / "trainer_state.json"]):
        if found := _content(path).get("max_steps"):
            return int(found)
    epochs = spec["recipe"].get("epochs")
    if rows and epochs and rows[-1].get("epoch"):
        return round(rows[-1]["step"] * epochs / rows[-1]["epoch"])
    return None


def shape(compute: Mapping[str, Any]) -> str:
    """The GPUs of a training: `8`, `2x8` for two machines, `cpu x2` for two processes without."""
    nodes, gpus = compute["nodes"], compute["gpus_per_node"]
    if gpus:
        return f"{nodes}x{gpus}" if nodes > 1 else str(gpus)
    processes = _processes(compute)
    return f"cpu x{processes}" if processes > 1 else "cpu"


def _processes(compute: Mapping[str, Any]) -> int:
    return int(compute["nodes"] * (compute["processes_per_node"] or max(1, compute["gpus_per_node"])))


def read_status(folder: Path) -> Status:
    """What the state folder ``runs/<stage>/<run>/<key>`` shows. Raises UserError when its `spec.json`
    can't be read.
    """
    spec = read_json(folder / "spec.json")["spec"]
    rows = last_metrics(folder / "metrics.jsonl")
    last = rows[-1] if rows else {}
    result, owner = _content(folder / "train_result.json"), _content(folder / OWNER)
    attempts = read_attempts(folder)
    idle = _idle(last, attempts)
    refusal = _content(folder / REFUSAL)
    ended = read_end(folder.parent)
    state = _state(result, owner, attempts, idle, refusal, ended)
    steps = total_steps(folder, spec, rows)
    reason, log = _refused(folder, refusal) if state == "refused" else _trouble(folder, state, attempts)
    if state == ENDED:
        reason = ended["reason"]
    return Status(
        stage=spec["stage"],
        run=spec["run"],
        state=state,
        step=int(last.get("step", result.get("step", 0))),
        steps=steps,
        loss=last.get("loss"),
        tokens_per_s=last.get("tokens_per_s"),
        tflop_per_s=last.get("tflop_per_s"),
        peak_share=last.get("peak_share"),
        data_wait_share=last.get("data_wait_share"),
        eta_s=_eta(rows, steps) if state == "running" else None,
        attempts=len(attempts),
        processes=_processes(spec["compute"]),
        saved_step=int(result["step"]) if state == "finished" else saved_step(folder),
        where=_where(owner or refusal or (attempts[-1] if attempts else {})),
        folder=str(folder),
        gpus=shape(spec["compute"]),
        idle_s=idle if state == "running" else None,
        reason=reason,
        log=log,
    )


def _where(place: Mapping[str, Any]) -> str:
    return f"job {place['job']}" if place.get("job") else str(place.get("host", ""))


def _idle(last: Mapping[str, Any], attempts: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds since the last step, or since the attempt began when it has made none."""
    times = [row["time"] for row in (last,) if "time" in row]
    times += [row["started"] for row in attempts[-1:] if "started" in row]
    return max(0.0, time.time() - max(times)) if times else None


def _refused(folder: Path, refusal: Mapping[str, Any]) -> tuple[str, str]:
    """Which check refused the start, and the log of the step that made it, where there is one."""
    root, (stage, run) = folder.parents[3], folder.parts[-3:-1]
    log = root / "logs" / stage / f"{run}.log"
    return " ".join(str(refusal["error"]).split()), str(log) if log.is_file() else ""


def _trouble(folder: Path, state: str, attempts: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Why a training failed and the log that says so; of a running one, why the attempt before failed."""
    if state == "running" and len(attempts) > 1 and attempts[-2].get("outcome") != "interrupted":
        log = folder / attempts[-2]["log"]
        return f"attempt {attempts[-2]['attempt']}: {_reason(attempts[-2], log)}", str(log)
    if state not in ("failed", "killed", STATUS):
        return "", ""
    log = folder / attempts[-1]["log"]
    said = read_verdict(folder) if state == STATUS else {}
    reason = " ".join(said["reason"].split()) if said else _reason(attempts[-1], log)
    return reason, str(log)


def error_line(logs: Sequence[Path]) -> str:
    """The last `error:` of the first log that has one, else what was raised in the first; empty without."""
    for log in logs:
        if said := [line for line in _tail(log) if line.startswith("error: ")]:
            return said[-1].removeprefix("error: ").strip()
    raised = [line.strip() for log in logs[:1] for line in _tail(log) if RAISED.match(line)]
    return raised[-1] if raised else ""


def _reason(attempt: Mapping[str, Any], log: Path) -> str:
    """Why an attempt ended: the last `error:` of its log, else what was raised, else how it ended."""
    if said := error_line([log]):
        return said
    if "outcome" not in attempt:
        return "it ended without a word (kill -9, out of memory, or the machine)"
    return f"it {attempt['outcome']}, without a message"


def _state(
    result: Mapping[str, Any],
    owner: dict[str, Any],
    attempts: Sequence[Mapping[str, Any]],
    idle: float | None,
    refusal: Mapping[str, Any],
    ended: Mapping[str, Any],
) -> str:
    if result.get("status") == "finished":
        return "finished"
    outcome = attempts[-1].get("outcome") if attempts else None
    lives = alive(owner) if owner else False
    if lives:
        return "running"
    if ended:
        return ENDED
    if refusal:
        return "refused"
    if lives is None and outcome is None:
        return "running" if idle is not None and idle < FRESH_S else "unknown"
    if not attempts:
        return "not started"
    if outcome is None:
        return "killed"
    return outcome if outcome in ("interrupted", STATUS) else "failed"


def _eta(rows: Sequence[Mapping[str, Any]], steps: int | None) -> float | None:
    """Seconds to the end at the pace of the last rows."""
    if steps is None or len(rows) < 2:
        return None
    recent = rows[-50:]
    passed, seconds = recent[-1]["step"] - recent[0]["step"], recent[-1]["time"] - recent[0]["time"]
    return (steps - recent[-1]["step"]) * seconds / passed if passed > 0 and seconds > 0 else None


def users(root: Path) -> dict[tuple[str, str], list[str]]:
    """The finished experiments that use a run: (stage, run) to their names."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(root.glob("experiments/*/checkpoint.json")):
        for stage, run in _content(path).get("runs", {}).items():
            found.setdefault((stage, run), []).append(path.parent.name)
    return found


def adopted(root: Path) -> list[str]:
    """One line for each finished experiment whose checkpoint was not trained here."""
    found = [
        (path.parent.name, _content(path)) for path in sorted(root.glob("experiments/*/checkpoint.json"))
    ]
    return [
        f"{name}: {origin_of(said['origin'])}, not trained here" for name, said in found if "origin" in said
    ]


def all_statuses(root: Path) -> list[Status]:
    """All trainings below the working folder ``root``, newest last. Folders that vanish meanwhile are left
    out.
    """
    names = users(root)
    found = [
        entry
        for stage in STAGES
        for path in root.glob(f"runs/{stage}/*/*/spec.json")
        for entry in _entry(path)
    ]
    found += _ended_unstarted(root)
    found.sort(key=lambda pair: pair[0])
    return [replace(item, experiments=names.get((item.stage, item.run), [])) for _, item in found]


def _ended_unstarted(root: Path) -> list[tuple[float, Status]]:
    """The trainings that were ended before they began: they have no state folder."""
    paths = [path for stage in STAGES for path in root.glob(f"runs/{stage}/*/{ENDED}.json")]
    return [
        (0.0, Status(path.parts[-3], path.parts[-2], ENDED, reason=found["reason"]))
        for path in paths
        if not list(path.parent.glob("*/spec.json")) and (found := read_end(path.parent))
    ]


def _entry(path: Path) -> Iterator[tuple[float, Status]]:
    """When a training was last started, and its status; nothing when its folder vanishes meanwhile."""
    folder = path.parent
    try:
        yield path.stat().st_mtime, read_status(folder)
    except (UserError, OSError, KeyError, TypeError) as error:
        if path.is_file():
            stage, run = folder.parts[-3:-1]
            yield (
                0.0,
                Status(
                    stage, run, "unreadable", folder=str(folder), reason=f"{type(error).__name__}: {error}"
                ),
            )
