"""What all steps share: mistakes told to the user, digests of values, manifests, progress.

A *manifest* is a small JSON file written last, after everything that it describes is complete and verified.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from llava_ext import files
from workflow_scripts.secrets import redact

T = TypeVar("T")


class UserError(Exception):
    """A mistake that its reader can mend: the message says what, where, what is allowed and the fix."""


class Hiccup(UserError):
    """What may have passed at the next attempt, without anybody mending anything: a network, a disk."""


class Refusal(SystemExit):
    """The end of a step that would end so again."""


def canonical_json(value: Any) -> str:
    """One spelling per value: sorted keys, no spaces, so that equal values have equal digests."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any, length: int = 64) -> str:
    """The first ``length`` hex digits of the sha256 of ``value``'s canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def write_json(path: Path, value: Any) -> None:
    """Writes a manifest, whole or not at all; a manifest's text is UTF-8 as it is."""
    files.write_json(path, value, ensure_ascii=False)


def read_json(path: Path) -> Any:
    """Reads JSON and, when it is damaged or absent, says which file and what to do."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Hiccup(f"{path}: the file does not exist; run the step that makes it first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); delete it and run the step that makes it again"
        ) from None


def progress(items: Iterable[T], total: int | None, what: str, every_s: float = 10.0) -> Iterator[T]:
    """Passes ``items`` on, showing a tqdm bar on a terminal and a plain line now and then elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=what, dynamic_ncols=True)
        return
    start = last = time.monotonic()
    done = 0
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= every_s:
            last = now
            share = f" of {total} ({100 * done / total:.0f} %)" if total else ""
            print(f"{what}: {done}{share}, {done / (now - start):.0f}/s", file=sys.stderr, flush=True)
    print(f"{what}: {done} done in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a :class:`UserError` into one message on stderr and exit status 1, without a traceback.

    Raises:
        Refusal: unless the error is a :class:`Hiccup`.
    """
    try:
        yield
    except UserError as error:
        print(redact(f"error: {error}"), file=sys.stderr, flush=True)
        raise (SystemExit if isinstance(error, Hiccup) else Refusal)(1) from None
