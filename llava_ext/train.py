"""``python -m llava_ext.train``: trains stage 1 or stage 2 of LLaVA, and continues by itself after any interruption.

Takes the flags of LLaVA's own scripts; see docs/training.md. Writes into ``--output_dir``; ``train_result.json`` comes last.
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .distributed.collectives import on_first_rank
from .training import claim, signals
from .training.identity import ROUNDING, check_identity, identity

if __name__ == "__main__":
    signals.listen()  # the next lines load for seconds what does not hear

from .distributed import elastic, meeting, offload
from .distributed.collectives import from_all
from .errors import TrainingError, say
from .training import states
from .training.interruption import Interruption
from .training.metrics import Metrics
from .training.watchdogs import FewLabels, NoStep, StuckAtZero

if TYPE_CHECKING:
    from .data.samples import SampleStore
    from .training.arguments import Arguments
    from .training.trainer import LlavaTrainer


def main(argv: Sequence[str] | None = None) -> None:
    """Trains. Exit status 0 when finished or interrupted (the result file says which), 1 for anything else."""
    signals.listen()
    faulthandler.enable()  # a crash in native code says where
    _quiet(sys.argv[1:] if argv is None else argv)
    from .training.arguments import parse

    try:
        run(parse(argv))
    except TrainingError as error:
        _fail(error)
    except ValueError as error:
        if not _is_readable(error):
            raise
        _fail(error)


def _quiet(argv: Sequence[str]) -> None:
    """No network when every model is a folder, no bars and repeated warnings in log files. Before anything heavy is imported."""
    # once for each call of every rank, otherwise
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    names = [
        value
        for flag, value in itertools.pairwise(argv)
        if flag in ("--model_name_or_path", "--vision_tower")
    ]
    if names and all(Path(name).is_dir() for name in names):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        from transformers.utils import logging

        logging.disable_progress_bar()


def _is_readable(error: ValueError) -> bool:
    """Whether an error is one of the package's own, whose message is meant for its reader."""
    return type(error).__module__.startswith(__package__ or "llava_ext") and type(error) is not ValueError


def _fail(error: Exception) -> NoReturn:
    # A dataset worker's error arrives wrapped in the text of its traceback.
    text = str(error).rsplit(f"{TrainingError.__module__}.TrainingError: ", 1)[-1].rstrip()
    rank = os.environ.get("RANK")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    print(f"error: {text}" + (f" (rank {rank})" if several else ""), file=sys.stderr, flush=True)
    meeting.end(1)


def run(arguments: Arguments) -> None:
    """The whole training, from checked arguments to ``train_result.json``."""
    for notice in arguments.notices:
        say(notice)
    watchdog = NoStep(arguments.training.watchdog_minutes, Path(arguments.training.output_dir))
    watchdog.start()
    try:
        _run(arguments, watchdog)
    finally:
        watchdog.end()
    meeting.leave()


def _run(arguments: Arguments, watchdog: NoStep) -> None:
    output_dir = Path(arguments.training.output_dir)
    watchdog.beat("the processes try their network")
    _start_distributed(arguments)
    meeting.check_traffic(arguments.training.device, arguments.training.meeting_timeout_s)
    watchdog.beat("opening data and checkpoints")
    store, folders = _open_inputs(arguments)
    finished = on_first_rank(lambda: _look_around(arguments, store, folders, output_dir))
    if finished:
        say(f"{output_dir}: this training is finished (step {finished['step']}); nothing to do")
        return
    share = (arguments.training.process_index, arguments.training.world_size)
    good = states.last_good(output_dir, share, on_first_rank, from_all)
    from .training.setup import make_trainer

    watchdog.beat("loading the model")
    trainer = make_trainer(arguments, store, folders, good.path if good else None)
    interruption = _watch(trainer, arguments, output_dir, watchdog)
    if good:
        _prepare_to_continue(trainer, good, watchdog)
    trainer.train(resume_from_checkpoint=str(good.path) if good else None)
    _conclude(trainer, interruption, arguments, folders, output_dir)


# ---- before the model -------------------------------------------------------------------------------------------


def _start_distributed(arguments: Arguments) -> None:
    """Process groups before anything is built: ZeRO-3 splits parameters while the model is made."""
    training = arguments.training
    if training.deepspeed:
        elastic.only_tensors()
        if offload.offloads_optimizer(training.hf_deepspeed_config.config):
            offload.build_cpu_adam()
    if training.deepspeed and training.device.type == "cpu":
        import deepspeed
        from deepspeed.ops import __compatible_ops__

        # Compiled at first use otherwise, for minutes, and a killed build leaves a lock that hangs every later start.
        __compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo")
    elif training.deepspeed:
        import deepspeed

        deepspeed.init_distributed()
    else:
        if training.fsdp and training.device.type == "cpu" and training.world_size > 1:
            _allow_fsdp_on_cpu()
        # accelerate imports DeepSpeed, for seconds, only to see that the model is none of its engines.
        import accelerate.utils.other

        accelerate.utils.other.is_deepspeed_available = lambda: False


def _allow_fsdp_on_cpu() -> None:
    """Lets accelerate take its FSDP path: torch's ``fully_shard`` runs with gloo, but accelerate asks for an accelerator.

    The type of the process group that accelerate keeps is read once, when the trainer makes its ``Accelerator``, which
    then replaces it by FSDP; the device stays the CPU.
    """
    from accelerate import DistributedType, PartialState

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def _open_inputs(arguments: Arguments) -> tuple[SampleStore, dict[str, Path]]:
    from .data.samples import open_samples
    from .model.parts import resolve_model

    model, cache = arguments.model, arguments.training.cache_dir
    folders = {"llm": resolve_model(model.model_name_or_path, "model_name_or_path", cache)}
    if not model.vision_tower:
        raise TrainingError("--vision_tower: missing; give the folder or hub id of a vision tower")
    folders["vision_tower"] = resolve_model(model.vision_tower, "vision_tower", cache)
    store = open_samples(arguments.data.data_path, arguments.data.image_folder, tolerant=True)
    if not len(store):
        raise TrainingError(f"--data_path {arguments.data.data_path}: holds no samples")
    return store, folders


def _look_around(
    arguments: Arguments, store: SampleStore, folders: dict[str, Path], output_dir: Path
) -> dict[str, Any] | None:
    """Claims the output folder, checks what is in it, and gives the result of a training that is finished."""
    output_dir.mkdir(parents=True, exist_ok=True)
    claim.claim(output_dir)
    if arguments.training.resume == "never" and any(output_dir.glob("checkpoint-*")):
        raise TrainingError(f"--resume never: {output_dir} holds checkpoints; delete it to start over")
    check_identity(output_dir, identity(arguments, store, folders), ROUNDING)
    finished = states.finished(output_dir)
    if finished:
        return finished
    states.clear_staging(output_dir)
    (output_dir / states.RESULT).unlink(missing_ok=True)
    return None


# ---- the run ----------------------------------------------------------------------------------------------------


def _watch(trainer: LlavaTrainer, arguments: Arguments, output_dir: Path, watchdog: NoStep) -> Interruption:
    training = arguments.training
    metrics = Metrics(
        output_dir, bool(getattr(training, "own_tensorboard", False)), lines=bool(training.disable_tqdm)
    )
    metrics.trainer = trainer
    trainer.watchdog = watchdog
    interruption = Interruption()
    window = training.watchdog_zero_steps
    for callback in (
        metrics,
        StuckAtZero(window, trainer.last_samples),
        FewLabels(arguments.data.supervised_share_bound if window else 0, window, trainer),
        watchdog,
        interruption,
    ):
        trainer.add_callback(callback)
    return interruption


def _prepare_to_continue(trainer: LlavaTrainer, good: states.Checkpoint, watchdog: NoStep) -> None:
    """Says what continuing changes, converts what another number of processes needs, refuses another engine."""
    checkpoint, facts = good.path, good.facts
    then, now = facts.get("world_size"), trainer.args.world_size
    if facts.get("engine") != trainer.engine:
        raise TrainingError(
            f"{checkpoint}: was saved with {facts.get('engine')}, this run uses {trainer.engine}; "
            "continue with the same --deepspeed or --fsdp setting (FSDP needs at least two processes), or start in a new --output_dir"
        )
    say(f"continuing from {checkpoint}" + (f", saved by {then} processes, now {now}" if then != now else ""))
    if then != now and trainer.engine.startswith("deepspeed"):
        folder = checkpoint.with_name(f"{states.STAGING}universal-{checkpoint.name}")
        watchdog.beat("converting the checkpoint")
        trainer.universal = elastic.convert_patiently(checkpoint, folder, on_first_rank, watchdog.beat)


def _conclude(
    trainer: LlavaTrainer,
    interruption: Interruption,
    arguments: Arguments,
    folders: dict[str, Path],
    output_dir: Path,
) -> None:
    """Writes the final weights and the result; after a signal only the result."""
    step = trainer.state.global_step
    if trainer.is_world_process_zero():
        claim.check_claim(output_dir)
    if interruption.stopped:
        if trainer.is_world_process_zero():
            states.write_result(output_dir, "interrupted", step)
        say(f"interrupted after step {step} of {trainer.state.max_steps}, saved; the same command continues")
        return
    state = trainer.gathered_state()
    if trainer.is_world_process_zero():
        from .training.finish import write_final

        folder = output_dir / f"{states.STAGING}final"
        shutil.rmtree(folder, ignore_errors=True)
        write_final(trainer, state, arguments, folders, folder)
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
        digests, sizes = states.publish(folder, output_dir)
        states.write_result(
            output_dir, "finished", step, files=digests, bytes=sizes, metrics=_summary(trainer)
        )
        say(f"finished after step {step}: {output_dir}")
    trainer._barrier()


def _summary(trainer: LlavaTrainer) -> dict[str, Any]:
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    tail = losses[-max(1, len(losses) // 20) :]
    return {
        "final_loss": losses[-1] if losses else None,
        "mean_loss_of_last_twentieth": sum(tail) / len(tail) if tail else None,
        "batches_without_labels": trainer.unsupervised_batches,
    }


if __name__ == "__main__":
    main()
