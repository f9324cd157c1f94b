"""The columns of a table of questions."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from workflow_scripts.config.base import StrictModel


class FieldsSpec(StrictModel):
    """Which columns (or keys of a record) of a table hold what."""

    question: str | None = "question"
    """The question, as it is asked; null where `prompt_prefix` is the question of all rows."""
    answer: str | None = "answer"
    """The right answer, or a list of answers that people gave; null where the first choice is right."""
    answer_words: dict[str, str] = Field(default_factory=dict)
    """What the values of that column mean: `{"0": "False", "1": "True"}`."""
    picture: str = "image"
    """The picture's name in the source's archive or folder, or (parquet) the picture itself."""
    name: str | None = None
    """What names the question; left out, its number."""
    stratum: str | None = None
    """The kind of question by which accuracies are told apart; left out, all are of one kind."""
    choices: str | None = None
    """The list of choices; they are put below the question as A., B., ..."""
    shuffle_choices: bool = False
    """Put the choices of each question in an order of its own, the same for every checkpoint."""

    @model_validator(mode="after")
    def _needs_choices(self) -> Self:
        if self.choices is None and (self.answer is None or self.shuffle_choices):
            key = "answer: null" if self.answer is None else "shuffle_choices: true"
            raise ValueError(f"fields.{key} without choices; name the column with the choices")
        return self
