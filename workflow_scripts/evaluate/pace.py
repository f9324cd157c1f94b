"""How fast answers were given: noted beside them by each process, read by the plan, which prices others."""

from __future__ import annotations

from pathlib import Path

from workflow_scripts.io import read_json, write_json


def note_pace(folder: Path, name: str, answers: int, seconds: float) -> None:
    """What one process has answered, and in how many seconds, its start aside."""
    write_json(folder / f"pace-{name}.json", {"answers": answers, "seconds": round(seconds, 3)})


def read_pace(run: Path) -> tuple[int, float]:
    """Answers of a run of predictions, and the seconds of all processes; zeros where none was noted."""
    found = [read_json(path) for path in sorted(run.glob("*/pace-*.json"))]
    return sum(item["answers"] for item in found), sum(item["seconds"] for item in found)
