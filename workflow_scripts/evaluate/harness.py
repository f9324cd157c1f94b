"""What asks the questions: recorded with every number, since numbers of different harnesses differ.

Raise ``VERSION`` when a change gives other answers to the same questions: all predictions are then made anew.
"""

from __future__ import annotations

from typing import Any

VERSION = 1


def harness() -> dict[str, Any]:
    """Name and version, for keys and manifests."""
    return {"name": "llava-spatial-workflow", "version": VERSION}
