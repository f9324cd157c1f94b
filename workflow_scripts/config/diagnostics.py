"""What is looked at inside the finished checkpoints."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from workflow_scripts.config.base import StrictModel
from workflow_scripts.config.types import Name, Positive


class DiagnosticsSpec(StrictModel):
    """Norms, attention and rotary positions of every finished checkpoint, on the pictures and first questions
    of the evaluation's tasks. See docs/evaluation.md.
    """

    tasks: Annotated[list[Name], Field(min_length=1)] | None = None
    """Whose questions; left out, those of all tasks."""
    pictures: Positive = 50
    """Look at the first so many pictures of a task, each with its first question."""
    layers: Annotated[list[Positive], Field(min_length=1)] | None = None
    """Layers of the language model, from 1, whose heads are looked at; left out, all. Norms and logits are
    taken at every layer.
    """
    batch_size: Positive = 8
    """Questions looked at together."""
    runtime_min: Positive = 60
    """Time limit of one job in minutes."""

    def looked_at(self) -> dict[str, Any]:
        """What decides the numbers."""
        layers = None if self.layers is None else sorted(set(self.layers))
        return {"pictures": self.pictures, "layers": layers}
