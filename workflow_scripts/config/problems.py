"""What is wrong with a configuration, for people: the key in the file, what was found, what is allowed,
the fix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

# What pydantic's errors allow, by their type or its first word.
ALLOWED = {
    "greater_than": "a number > {gt}",
    "greater_than_equal": "a number >= {ge}",
    "less_than": "a number < {lt}",
    "less_than_equal": "a number <= {le}",
    "string_pattern_mismatch": "a text of the form {pattern}",
    "missing": "a value: the key is required",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "dict": "a section (key: value lines)",
    "model": "a section (key: value lines)",
    "tuple": "a list",
    "list": "a list",
}


@dataclass(frozen=True)
class Problem:
    """Something wrong with a configuration."""

    key: str
    found: Any
    allowed: str
    fix: str

    def __str__(self) -> str:
        if self.allowed.startswith("found "):  # the message says it all
            return f"{self.key}: {self.allowed}; fix: {self.fix}"
        found = "nothing" if self.found is None else repr(self.found)
        return f"{self.key}: found {found}; allowed: {self.allowed}; fix: {self.fix}"


def known(values: Iterable[Any]) -> str:
    """The names of a section, for a message."""
    return ", ".join(sorted(values)) or "(there are none)"


def suggestion(word: Any, names: Iterable[Any], otherwise: str) -> str:
    """`did you mean 'x'?`, or something else to do where no name is close."""
    close = get_close_matches(str(word), [str(name) for name in names], n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else otherwise


def find_problems(
    model: type[BaseModel], raw: Any, error: ValidationError, prefix: str = ""
) -> list[Problem]:
    """All that pydantic found in ``raw``, which stands in the file under ``prefix``."""
    found = error.errors()
    # A list is not too short because its items are wrong.
    own = [item for item in found if item["type"] != "too_short" or not _has_cause(item["loc"], found)]
    schema = model.model_json_schema()
    return [_problem(item, raw, prefix, _Schema(schema, schema.get("$defs", {}))) for item in own]


def _has_cause(place: tuple[Any, ...], found: list[Any]) -> bool:
    return any(item["loc"][: len(place)] == place and item["loc"] != place for item in found)


def _problem(error: Any, raw: Any, prefix: str, schema: _Schema) -> Problem:
    place, kind, value, context = error["loc"], error["type"], error["input"], error.get("ctx", {})
    key = _written(prefix, raw, place) or "the file"
    if kind == "extra_forbidden":
        keys = {name for section in schema.at(place[:-1]) for name in section["properties"]}
        fix = suggestion(place[-1], keys, "remove it")
        listed = "" if "did you mean" in fix else f"; keys: {known(keys)}"
        return Problem(key, value, f"found {place[-1]!r}, and there is no such key here{listed}", fix)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        names = [section["properties"]["kind"]["const"] for section in schema.at(place)]
        tag = value.get("kind") if isinstance(value, Mapping) else None
        return Problem(f"{key}.kind", tag, f"one of {', '.join(names)}", suggestion(tag, names, "set kind"))
    if kind == "literal_error":
        names = [name.strip("' ") for name in context["expected"].replace(" or ", ", ").split(",")]
        fix = suggestion(value, names, "choose one of them")
        return Problem(key, value, f"one of {', '.join(names)}", fix)
    if kind == "value_error":  # our own messages end in `; what to do`
        message, fix = _split(str(context["error"]))
        if isinstance(value, Mapping | list | tuple | BaseModel):  # too long to be shown
            message = f"found {message.removeprefix('found ')}"
        return Problem(key, value, message, fix)
    template = ALLOWED.get(kind) or ALLOWED.get(kind.split("_")[0])
    allowed = template.format(**context) if template else str(error["msg"])
    return Problem(
        key, None if kind == "missing" else value, allowed, "add it" if kind == "missing" else "correct it"
    )


def _split(text: str) -> tuple[str, str]:
    message, _, fix = text.rpartition("; ")
    return (message, fix) if message else (text, "correct the value")


def _written(prefix: str, raw: Any, place: tuple[Any, ...]) -> str:
    """The key as it stands in the file; pydantic's own has the `kind` of a union and marks keys in it."""
    words, here = [prefix] if prefix else [], raw
    for item in place:
        if isinstance(here, Mapping) and (item in here or item not in ("[key]", here.get("kind"))):
            words.append(str(item))
            here = here.get(item)
        elif isinstance(here, list | tuple) and isinstance(item, int):
            words.append(f"[{item}]")
            here = here[item]
    return ".".join(words).replace(".[", "[")


@dataclass(frozen=True)
class _Schema:
    """A JSON schema with its definitions."""

    schema: Mapping[str, Any]
    definitions: Mapping[str, Any]

    def at(self, place: tuple[Any, ...]) -> list[Mapping[str, Any]]:
        """The sections that may stand at ``place``: several where there are kinds."""
        here = self.schema
        if "$ref" in here:
            here = self.definitions[here["$ref"].rsplit("/", 1)[-1]]
        if options := here.get("oneOf") or here.get("anyOf"):
            return [found for option in options for found in self._with(option).at(place)]
        if not place:
            return [here] if "properties" in here else []
        item, fields = place[0], here.get("properties", {})
        if fields.get("kind", {}).get("const") == item:
            return self._with(here).at(place[1:])
        patterns = list(here.get("patternProperties", {}).values())
        below = (
            fields.get(item) or here.get("items") or next(iter(patterns), here.get("additionalProperties"))
        )
        return self._with(below).at(place[1:]) if isinstance(below, Mapping) else []

    def _with(self, schema: Mapping[str, Any]) -> _Schema:
        return _Schema(schema, self.definitions)
