"""The accuracies of all experiments as rows, as text for a terminal, and as a CSV file. Imports nothing
heavy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

CONDITIONS = ("normal", "permuted", "blank")


def question_types(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """All question types, in the order in which the evaluations name them."""
    return list(dict.fromkeys(kind for found in evaluations.values() for kind in found["question_types"]))


def standard_error(share: float, questions: int) -> float:
    """Of a share of right answers among so many questions."""
    return math.sqrt(max(0.0, share * (1 - share)) / questions)


def is_near_chance(share: float, chance: float, questions: int) -> bool:
    """Whether an accuracy is at most two standard errors above guessing."""
    return share <= chance + 2 * standard_error(chance, questions)


def accuracy_rows(evaluations: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each experiment, question type and condition. Shares are fractions."""
    rows = []
    for name, found in evaluations.items():
        for condition, shares in found["accuracy"].items():
            for kind, share in shares.items():
                questions = found["questions"][kind]
                row = {"experiment": name, "question_type": kind, "condition": condition, "accuracy": share}
                row |= {"chance": found["chance"][kind], "questions": questions}
                row |= {"standard_error": round(standard_error(share, questions), 4)}
                rows.append(row | {"permute_seed": found["spec"]["permute_seed"]})
    return rows


def _line(name: str, width: int, cells: Sequence[Sequence[str]]) -> str:
    groups = ["".join(f"{cell:>6}" for cell in group) for group in cells]
    return f"  {name:<{width}}" + " |".join(groups)


def text_table(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """The accuracies in %, one line an experiment; an empty text without evaluations."""
    kinds = question_types(evaluations)
    if not kinds:
        return ""
    width = max(len(name) for name in [*evaluations, "experiment"]) + 1
    first = next(iter(evaluations.values()))
    lines = [
        f"  {'':<{width}}" + " |".join(f"{kind:>18}" for kind in kinds),
        _line("experiment", width, [["as is", "perm.", "blank"]] * len(kinds)),
    ]
    for name, found in evaluations.items():
        cells = [[_percent(found["accuracy"].get(c, {}).get(kind)) for c in CONDITIONS] for kind in kinds]
        lines.append(_line(name, width, cells))
    lines.append(_line("chance", width, [[_percent(first["chance"].get(kind)), "", ""] for kind in kinds]))
    lines.append(
        _line("questions", width, [[str(first["questions"].get(kind, "")), "", ""] for kind in kinds])
    )
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"
