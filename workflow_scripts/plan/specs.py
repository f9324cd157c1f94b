"""Parts of the configuration as JSON: for keys, for steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from workflow_scripts.config.base import StrictModel

# How a file is fetched and what it is compared with, not what it is.
TRANSPORT = frozenset(
    {"mirrors", "connections_per_host", "bytes", "about_gb", "trust", "local", "expected_images"}
)


def plain(model: StrictModel) -> dict[str, Any]:
    """A section as JSON values: what differs from the defaults, and always the kind."""
    found = model.model_dump(mode="json", exclude_defaults=True)
    kind = getattr(model, "kind", None)
    return {"kind": kind, **found} if kind else found


def recipe(model: StrictModel) -> dict[str, Any]:
    """What a section says about the result: :func:`plain` without transport and bookkeeping."""
    left_out = TRANSPORT | getattr(type(model), "NOT_IN_RECIPE", frozenset())
    return {key: _strip(value) for key, value in plain(model).items() if key not in left_out}


def _strip(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strip(item) for key, item in value.items() if key not in TRANSPORT}
    return [_strip(item) for item in value] if isinstance(value, list) else value


def compact(value: Any) -> str:
    """JSON for a command line: one spelling per value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
