"""The evaluations of all experiments as rows, and as text for a terminal. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Tasks = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""The scores by task and experiment, as `experiments/<experiment>/evaluation/<task>.json` has them."""
ALL = "all"
CONDITIONS = {"normal": "as is", "permuted": "permuted", "blank": "blank", "text_only": "text only"}
SHORT = {"normal": "as is", "permuted": "perm.", "blank": "blank", "text_only": "text"}


def strata_of(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A task's strata in the order of its questions; all questions together where there is only one."""
    strata = list(dict.fromkeys(kind for item in scores.values() for kind in item["strata"]))
    return strata if len(strata) > 1 else [ALL]


def conditions_of(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The conditions under which some experiment was asked."""
    return [name for name in CONDITIONS if any(name in item["accuracy"] for item in scores.values())]


def is_near_chance(found: Mapping[str, Any], chance: float | None) -> bool:
    """Whether the interval of an accuracy reaches down to guessing."""
    return chance is not None and found["low"] <= chance


def is_below_chance(scores: Mapping[str, Any]) -> bool:
    """Whether guesses would be better: then the metric may not read the answers."""
    level = scores["chance"].get(ALL)
    return level is not None and scores["accuracy"]["normal"][ALL]["high"] < level


def accuracy_rows(tasks: Tasks) -> list[dict[str, Any]]:
    """One row for each task, experiment, condition and stratum. Shares are fractions."""
    return [
        {
            "experiment": name,
            "task": task,
            "stratum": kind,
            "condition": condition,
            "accuracy": cell["value"],
            "low": cell["low"],
            "high": cell["high"],
            "chance": found["chance"].get(kind),
            **{key: cell[key] for key in ("questions", "pictures", "empty", "unparsed")},
            **_index(found, kind if condition == "permuted" else ""),
            "metric": found["scored"]["metric"],
            "harness": "{name} {version}".format(**found["harness"]),
        }
        for task, scores in tasks.items()
        for name, found in scores.items()
        for condition, cells in found["accuracy"].items()
        for kind, cell in cells.items()
    ]


def _index(found: Mapping[str, Any], kind: str) -> dict[str, float | None]:
    """PSI with its interval, for the row of permuted answers."""
    psi = found["psi"].get(kind) or {}
    return {f"psi{end}": psi.get(key) for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))}


def difference_rows(comparisons: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each experiment, task and stratum: the difference to the baseline."""
    return [
        {"experiment": name, "baseline": found["baseline"], "task": task, "stratum": kind, **cell}
        for name, found in comparisons.items()
        for task, cells in found["tasks"].items()
        for kind, cell in cells.items()
    ]


# ---- for a terminal -------------------------------------------------------------------------------------


def text_table(tasks: Tasks) -> str:
    """The accuracies in %, a table a task, one line an experiment; an empty text without evaluations."""
    return "\n\n".join(_task_table(task, scores) for task, scores in tasks.items())


def _task_table(task: str, scores: Mapping[str, Mapping[str, Any]]) -> str:
    kinds, conditions = strata_of(scores), conditions_of(scores)
    width = max(len(name) for name in [*scores, "experiment", task]) + 1
    first = next(iter(scores.values()))
    lines = [
        f"  {task:<{width}}" + " |".join(f"{kind:>{6 * len(conditions)}}" for kind in kinds),
        _line("experiment", width, [[SHORT[name] for name in conditions]] * len(kinds)),
    ]
    for name, found in scores.items():
        cells = [[found["accuracy"].get(c, {}).get(kind) for c in conditions] for kind in kinds]
        shares = [[_percent(cell["value"] if cell else None) for cell in group] for group in cells]
        lines.append(_line(name, width, shares))
    empty = [""] * (len(conditions) - 1)
    lines.append(_line("chance", width, [[_percent(first["chance"].get(kind)), *empty] for kind in kinds]))
    asked = [str(first["accuracy"]["normal"].get(kind, {}).get("questions", "")) for kind in kinds]
    return "\n".join([*lines, _line("questions", width, [[number, *empty] for number in asked])])


def _line(name: str, width: int, cells: Sequence[Sequence[str]]) -> str:
    groups = ["".join(f"{cell:>6}" for cell in group) for group in cells]
    return f"  {name:<{width}}" + " |".join(groups)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"
