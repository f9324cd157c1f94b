"""What is measured on the finished checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field

from workflow_scripts.config.base import StrictModel
from workflow_scripts.evaluate.tasks import TASKS

if TYPE_CHECKING:
    TaskName: TypeAlias = str
else:
    TaskName = Literal[tuple(TASKS)]
Level = Annotated[int, Field(ge=0, le=255)]


class EvaluationSpec(StrictModel):
    """Accuracy by question type, by greedy generation on held-out questions.

    Each question is asked three times: as it is, with the vision tokens permuted, and about a blank picture
    (what can be guessed without seeing anything).
    """

    source: str
    """Name of the source with the questions: one question a record, with `question_type` (a `shapes` source
    with `split: test`)."""
    task: TaskName = "shapes"
    """What kind of questions they are, and what counts as right (`workflow_scripts/evaluate/tasks/`)."""
    pictures: int | None = Field(default=None, ge=1)
    """Use the first so many pictures of the source; null means all."""
    permute_seed: int = 0
    """Seed of the permutation of the vision tokens; each question gets its own permutation."""
    blank_colour: tuple[Level, Level, Level] = (122, 116, 104)
    """Red, green and blue (0 to 255) of the blank picture; the default is the mean of CLIP's training
    pictures.
    """
    batch_size: int = Field(default=128, ge=1)
    """Questions answered at once."""
    max_new_tokens: int = Field(default=8, ge=1, le=256)
    """Longest answer, in tokens."""
    examples: int = Field(default=6, ge=0, le=50)
    """Pictures shown in the report with each checkpoint's answers."""
