"""A task of lmms-eval over the files of a source."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from workflow_scripts.config.base import StrictModel

Option = bool | int | float | str


class PictureTableSpec(StrictModel):
    """Pictures that lie in files of their own and not beside their questions, as GQA's do."""

    files: str
    """Which of the source's files hold them, as the end of a path: `testdev_balanced_images/*.parquet`."""
    name: str = "id"
    """The column with the pictures' names."""
    picture: str = "image"
    """The column with the pictures."""
    question: str = "imageId"
    """The column of the questions that says which picture they ask about."""


class LmmsSpec(StrictModel):
    """Which task of lmms-eval is asked, and how its numbers are read."""

    ABOUT_SCORES: ClassVar = frozenset({"metric", "full_score"})

    task: str
    """The name of a task (no group): `pope_adv`, `gqa`, `mmbench_en_dev_static`."""
    files: str = "*"
    """Which of the source's annotation files hold the questions, as the end of a path:
    `Full/adversarial-*.parquet`. They take the place of the split that the task would fetch.
    """
    pictures: PictureTableSpec | None = None
    """Where the pictures are, if not in the questions' files."""
    only: dict[str, Option] = Field(default_factory=dict)
    """Ask the questions alone that have these values in these columns: `{data_type: image}` of `seedbench`,
    whose other questions are about films."""
    stratum: str | None = None
    """The column by which accuracies are told apart; left out, all questions are of one kind."""
    answer: str | None = None
    """The column that is shown as the right answer; left out, what the task says. Scores do not depend on
    it."""
    prompt: dict[str, Option] = Field(default_factory=dict)
    """The task's own settings of its prompt (`lmms_eval_specific_kwargs`): `{ocr: true}` of `textvqa_val`."""
    metric: str | None = None
    """The task's metric that is the score of a question; left out, its first."""
    full_score: Annotated[float, Field(gt=0)] = 1.0
    """What that metric gives to a right answer; scores are divided by it."""

    def asked(self) -> dict[str, Any]:
        """What decides the questions: JSON values, without defaults."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude=set(self.ABOUT_SCORES))
