"""The stages of a training, in the order in which an experiment passes them: the only list of them.

From it follow the section `stages`, what an experiment may change, the rules, the folders under ``runs/``,
the links under ``experiments/``, flags of the command line, and the headings of the report. Imports nothing:
all may import it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage: a rule that trains, a section of the configuration, a folder under ``runs/``."""

    name: str
    """The rule's, the section's and the folder's name."""
    title: str
    """The heading in the report."""
    purpose: str
    """One sentence for the reference page."""
    trains_llm: bool
    """False where only the projector is trained: then no LoRA, and the projector can't be frozen."""
    priority: int
    """Snakemake's: of jobs that could start, the highest goes first."""
    parent: str | None = None
    """The stage whose result it begins with."""
    takes: str | None = None
    """The file of the parent's result that it begins with: the projector."""


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="pretrain",
            title="Stage 1: projector on captions",
            purpose="Stage 1: aligns the projector with the LLM on captions.",
            trains_llm=False,
            priority=10,
        ),
        Stage(
            name="finetune",
            title="Stage 2: projector and language model",
            purpose="Stage 2: instruction tuning.",
            trains_llm=True,
            # before exports and evaluations: the longest jobs decide when everything is done
            priority=5,
            parent="pretrain",
            takes="mm_projector.safetensors",
        ),
    )
}


def last_stage() -> str:
    """The stage whose result is exported and evaluated."""
    return list(STAGES)[-1]
