"""The columns of a table of questions."""

from __future__ import annotations

from workflow_scripts.config.base import StrictModel


class FieldsSpec(StrictModel):
    """Which columns (or keys of a record) of a table hold what."""

    question: str = "question"
    """The question, as it is asked."""
    answer: str = "answer"
    """The right answer, or a list of answers that people gave."""
    picture: str = "image"
    """The picture's name in the source's archive or folder, or (parquet) the picture itself."""
    name: str | None = None
    """What names the question; left out, its number."""
    stratum: str | None = None
    """The kind of question by which accuracies are told apart; left out, all are of one kind."""
    choices: str | None = None
    """The list of choices; they are put below the question as A., B., ..."""
