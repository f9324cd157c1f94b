"""The interventions as options of a command line, made from the fields of ``Interventions``."""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Callable
from typing import Any

from ..model.interventions import DEFAULTS, Interventions, description
from .llava_flags import FALSE, TRUE


def add_interventions(parser: argparse.ArgumentParser, title: str) -> None:
    """Adds one option a field, in a group of their own; those that are not given leave nothing in the
    namespace.
    """
    group = parser.add_argument_group(title)
    for name, hint in typing.get_type_hints(Interventions).items():
        if name not in DEFAULTS:
            continue
        options: dict[str, Any] = {"help": description(name), "default": argparse.SUPPRESS}
        if hint is bool:
            options |= {"nargs": "?", "const": True, "type": switch}
        elif typing.get_origin(hint) is tuple:
            options |= {"nargs": "+", "type": _reader(list[int])}
        else:
            options |= {"type": _reader(hint)}
        group.add_argument(f"--{name}", **options)


def take_interventions(namespace: argparse.Namespace) -> Interventions | None:
    """The checked interventions that were given; None where none was. Raises ``InterventionError``."""
    given = {name: getattr(namespace, name) for name in DEFAULTS if hasattr(namespace, name)}
    if not given:
        return None
    for name, value in given.items():
        if isinstance(value, list):  # an option with several values, each of which may be a list
            given[name] = tuple(number for part in value for number in part)
    chosen = Interventions.from_mapping(given)
    chosen.validate()
    return chosen


def switch(text: str) -> bool:
    """True or False, in the spellings that LLaVA's scripts may use."""
    if text.lower() in TRUE:
        return True
    if text.lower() in FALSE:
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def _reader(hint: Any) -> Callable[[str], Any]:
    """How a value is read from text; ``None`` as text is a missing value where there may be none."""
    if hint == list[int]:
        return _whole_numbers
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not types.NoneType)

    def read(text: str) -> Any:
        return None if types.NoneType in kinds and text in ("None", "null") else kind(text)

    read.__name__ = kind.__name__  # argparse says: invalid int value
    return read


def _whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.strip("[]").split(",") if part]
