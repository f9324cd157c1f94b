"""What the manifests of trainings say, for those who read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def left_out(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records that a training left out in the end: number, id and source of each."""
    history = manifest.get("skipped", [])
    return list(history[-1]["records"]) if history else []


def origin_of(said: Mapping[str, Any]) -> str:
    """Where a checkpoint that was not trained here comes from, in words."""
    return (
        f"{said['repo']} at {said['revision']}" if "repo" in said else str(said.get("path", "this machine"))
    )
