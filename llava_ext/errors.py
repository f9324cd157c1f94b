"""What a person reads: errors that name the mend, and lines from the first rank."""

from __future__ import annotations

import os
import sys


class TrainingError(Exception):
    """A mistake that its reader can mend, or a stop with a reason: shown without a traceback.

    A verdict: the same settings, records and code will end the same way, so no further attempt is made.
    """


class NoVerdict(TrainingError):
    """A stop that says nothing of the next attempt.

    Its cause lies in a machine, the network or a disk, or another process says it.
    """


def say(message: str, every_rank: bool = False) -> None:
    """One line for the person who reads the log, from the first rank only unless ``every_rank``."""
    if every_rank or int(os.environ.get("RANK", "0")) == 0:
        print(f"llava_ext: {message}", file=sys.stderr, flush=True)
