"""What a person sees: nothing that fills a log, no question to a network, and messages instead of tracebacks.

Loads nothing heavy, so that it can come before everything else.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..errors import TrainingError, say

PINS = Path(__file__).parents[2] / "envs/requirements.txt"


def quiet(argv: Sequence[str]) -> None:
    """No network when every model is a folder, no bars and repeated warnings in log files. Before
    libraries are loaded.
    """
    # once for each call of every rank, otherwise
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    flags = ("--model_name_or_path", "--vision_tower")
    names = [value for flag, value in itertools.pairwise(argv) if flag in flags]
    if names and all(Path(name).is_dir() for name in names):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def require_transformers(pins: Path = PINS) -> None:
    """Ends the process with one line where transformers is of another release than the one whose classes
    are extended here.
    """
    pinned = re.search(
        r"^transformers==([\w.]+)", pins.read_text(encoding="utf-8") if pins.is_file() else "", re.MULTILINE
    )
    try:
        found = version("transformers")
    except PackageNotFoundError:
        found = "none"
    if pinned is None or found == pinned[1]:
        return
    text = f"transformers {found} is installed, {pins} pins {pinned[1]}"
    if found.split(".")[:2] != pinned[1].split(".")[:2]:
        print(f"error: {text}, whose classes this code extends; run `make env`", file=sys.stderr, flush=True)
        raise SystemExit(1)
    say(f"{text}; results may differ in the last digits")


def message(error: Exception) -> str | None:
    """An error's text for people; None for one of a library, which only its traceback explains."""
    own = type(error).__module__.startswith("llava_ext.")
    if not own or not isinstance(error, (TrainingError, ValueError)):
        return None
    # A dataset worker's error arrives wrapped in the text of its traceback.
    text = re.split(rf"{re.escape(TrainingError.__module__)}\.\w+: ", str(error))[-1].rstrip()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return text + (f" (rank {os.environ.get('RANK')})" if several else "")
