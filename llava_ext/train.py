"""``python -m llava_ext.train``: trains stage 1 or stage 2 of LLaVA, and continues by itself after any
interruption.

Takes the flags of LLaVA's own scripts; see docs/training.md. Writes into ``--output_dir``;
``train_result.json`` comes last.
"""

from __future__ import annotations

import faulthandler
import gc
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from .training import console, signals

if __name__ == "__main__":
    # Ahead of all that loads for seconds, hears no signal meanwhile, and reads the environment once.
    signals.install_handlers()
    console.quiet(sys.argv[1:])
    console.require_transformers()
    gc.disable()  # nothing of what is loaded is garbage; looking for some takes a sixth of the time

from .data.skipping import find_records, identified
from .distributed import processes
from .distributed.collectives import from_all, on_first_rank
from .errors import TrainingError, say
from .training import resume, states, verdict
from .training.arguments import Arguments, parse
from .training.callbacks import add_callbacks
from .training.finish import conclude
from .training.identity import note_skipped
from .training.recompute import advice
from .training.setup import make_trainer, open_inputs, open_output
from .training.watchdogs import NoStep


def main(argv: Sequence[str] | None = None) -> None:
    """Trains. Exit status 0 when finished or interrupted, 1 for anything else; the result file says which."""
    gc.enable()
    gc.freeze()
    signals.install_handlers()
    faulthandler.enable()  # a crash in native code says where
    console.quiet(sys.argv[1:] if argv is None else argv)
    given = sys.argv[1:] if argv is None else list(argv)
    try:
        run(parse(argv))
    except (TrainingError, ValueError, RuntimeError) as error:
        why = verdict.reason(error)
        if why is not None:
            verdict.record(given, why)
        text = why or console.message(error)
        if text is None:
            raise
        if verdict.is_out_of_memory(error):
            traceback.print_exc()
        print(f"error: {text}", file=sys.stderr, flush=True)
        processes.exit_with(1)


def run(arguments: Arguments) -> None:
    """A training under watch, from checked arguments to the end of its processes."""
    for notice in arguments.notices:
        say(notice)
    with NoStep(arguments.training.watchdog_minutes, Path(arguments.training.output_dir)) as watchdog:
        train(arguments, watchdog)
    processes.finish()


def train(arguments: Arguments, watchdog: NoStep) -> None:
    """The recipe: processes, data, output folder, model, steps, files."""
    training, output_dir = arguments.training, Path(arguments.training.output_dir)

    watchdog.beat("the processes try their network")
    processes.start(training)
    processes.check_network(training.device, training.meeting_timeout_s)

    watchdog.beat("opening data and checkpoints")
    store, folders = open_inputs(arguments)
    skipped = on_first_rank(lambda: find_records(store, arguments.data.skip_samples))
    finished = on_first_rank(lambda: open_output(arguments, store, folders, skipped))
    if finished:
        say(f"{output_dir}: this training is finished (step {finished['step']}); nothing to do")
        return
    share = (training.process_index, training.world_size)
    good = states.last_good(output_dir, share, on_first_rank, from_all)
    step = good.step if good else 0
    on_first_rank(lambda: note_skipped(output_dir, identified(store, skipped), step))

    watchdog.beat("loading the model")
    trainer = make_trainer(arguments, store, folders, good.path if good else None, skipped)
    interruption = add_callbacks(trainer, arguments, watchdog)
    if good:
        resume.prepare(trainer, good, watchdog)

    with advice(trainer.model, training, trainer.largest_tokens):
        trainer.train(resume_from_checkpoint=str(good.path) if good else None)

    conclude(trainer, arguments, folders, interrupted=interruption.stopped)


if __name__ == "__main__":
    main()
