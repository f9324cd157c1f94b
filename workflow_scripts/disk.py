"""Disks that are too small: noticed before the work where possible, explained where not."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workflow_scripts.io import Hiccup, UserError

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def size_text(count: float) -> str:
    """Bytes for people: 512 bytes, 3.1 MB, 27.36 GB."""
    if count < 10_000:
        return f"{count:.0f} bytes"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Raises :class:`UserError` when the disk can't hold ``needed`` more bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{what}: {size_text(needed)} are needed in {folder}, but the disk has {size_text(free)} free;"
            " free space, or put the working folder on a larger disk (`snakemake --directory`), and run it"
            " again"
        )


@contextmanager
def explain_full_disk(folder: Path, kept: str) -> Iterator[None]:
    """Turns the kernel's refusal to write on into a message; ``kept`` says what is not lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise Hiccup(
            f"{folder}: the disk is full (or a quota is); {kept}. Free space on that disk, or put the working"
            " folder on a larger one, and run the same command again"
        ) from None
