"""What has to be said and done before a training continues from a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..distributed import elastic
from ..distributed.collectives import on_first_rank
from ..errors import TrainingError, say
from . import states

if TYPE_CHECKING:
    from .trainer import LlavaTrainer
    from .watchdogs import NoStep


def prepare(trainer: LlavaTrainer, good: states.Checkpoint, watchdog: NoStep) -> None:
    """Says what continuing changes, converts what another number of processes needs, refuses another
    engine.
    """
    checkpoint, facts = good.path, good.facts
    trainer.saved_step = good.step
    then, now = facts.get("world_size"), trainer.args.world_size
    if facts.get("engine") != trainer.engine:
        raise TrainingError(
            f"{checkpoint}: was saved with {facts.get('engine')}, this run uses {trainer.engine}; continue"
            " with the same --deepspeed or --fsdp setting (FSDP needs at least two processes), or start in a"
            " new --output_dir"
        )
    say(f"continuing from {checkpoint}" + (f", saved by {then} processes, now {now}" if then != now else ""))
    if then != now and trainer.engine.startswith("deepspeed"):
        folder = checkpoint.with_name(f"{states.STAGING}universal-{checkpoint.name}")
        watchdog.beat("converting the checkpoint")
        trainer.universal = elastic.convert_patiently(checkpoint, folder, on_first_rank, watchdog.beat)
