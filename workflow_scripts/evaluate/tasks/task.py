"""What a kind of question is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from workflow_scripts.config.question_fields import FieldsSpec
from workflow_scripts.io import digest


@dataclass(frozen=True)
class Question:
    """One question with its right answers.

    Attributes:
        name: names it, within its task, for every checkpoint.
        image: the picture that it asks about; questions about one picture are not independent.
        type: its stratum.
        answers: the right one, or those that people gave.
        choices: the texts of the options, in order.
    """

    name: str
    image: str
    type: str
    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Of all that is asked and expected."""
        return digest([self.name, self.image, self.type, self.text, self.answers, self.choices], 16)


Pictures = Callable[[str], bytes]
"""From a question's `image` to the bytes of the picture's file. Raises UserError where there is none."""


@dataclass(frozen=True)
class Task:
    """One form of questions."""

    name: str
    """The value of `kind` in `evaluation.tasks.<name>`."""
    read: Callable[[Path, FieldsSpec | None], list[Question]]
    """The questions of a source, given its manifest, in a fixed order. Raises UserError for records that
    are none.
    """
    pictures: Callable[[Path, FieldsSpec | None, Sequence[Question]], AbstractContextManager[Pictures]]
    """The pictures of these questions, read when they are asked for."""
    prepared: bool = False
    """Whether a step of its own writes the questions first, in the environment that has lmms-eval: the source
    is then what it wrote, and `lmms` says which task.
    """
    takes_fields: bool = False
    """Whether `fields` says which columns hold what."""
