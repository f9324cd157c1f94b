"""What a kind of evaluation task is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Question:
    """One held-out question with its right answer."""

    name: str
    image: str
    type: str
    text: str
    answer: str


@dataclass(frozen=True)
class Task:
    """One kind of task: where its questions come from and what counts as right."""

    name: str
    """The value of `evaluation.task`."""
    read: Callable[[Path], list[Question]]
    """The questions of a source, given its manifest, in a fixed order. Raises UserError for records that
    are none.
    """
    is_right: Callable[[str, str], bool]
    """Whether the first, a given answer, is as good as the second, the right one."""
    chance: Callable[[Sequence[Question]], dict[str, float]]
    """By question type: the share of right answers of one who guesses."""
