"""The conditions under which a question is asked."""

from __future__ import annotations

from dataclasses import dataclass

from workflow_scripts.config.evaluation import ConditionsSpec
from workflow_scripts.evaluate.tasks.task import Question
from workflow_scripts.io import digest


@dataclass(frozen=True)
class Condition:
    """`normal`, `permuted` (the picture's vision tokens reach the language model in a random order: same
    content, no order), `blank` (a picture of one colour) or `text_only`; ``seed`` tells permutations apart.
    """

    name: str
    seed: int = 0


def conditions_of(spec: ConditionsSpec) -> list[Condition]:
    """All conditions of a task, each permutation for itself."""
    return [
        Condition("normal"),
        *(Condition("permuted", seed) for seed in range(spec.permuted)),
        *(Condition(name) for name in ("blank", "text_only") if getattr(spec, name)),
    ]


def permutation_seed(seed: int, question: Question) -> int:
    """The seed of one question's permutation: the same for every checkpoint, whatever the batches."""
    return int(digest([seed, question.name], 12), 16)
