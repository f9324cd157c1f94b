"""YAML files: what does not mean what it looks like is refused with the line and the fix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from workflow_scripts.io import UserError

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
TAG = "tag:yaml.org,2002:"
# (what YAML takes it for, what it looks like, what to do): plain scalars that people write and mean
# otherwise.
SURPRISES = (
    (
        "int",
        r"[-+]?0[0-7_]+",
        "YAML reads it as an octal number; write it without the 0, or in quotes",
    ),
    ("int", r".*:.*", "YAML reads it as a number in base 60; put it in quotes, or write the number"),
    ("float", r".*:.*", "YAML reads it as a number in base 60; put it in quotes, or write the number"),
    (
        "bool",
        r"(?i)y|yes|n|no|on|off",
        "YAML reads it as true or false; write that, or put a name in quotes",
    ),
    ("timestamp", r".*", "YAML reads it as a date; put it in quotes"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a configuration file. Raises UserError that names the file and the line."""
    try:
        loader = Loader(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: the file does not exist; give the path of a configuration file") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    try:
        node = loader.get_single_node()
        wrong = list(_surprises(node)) if node is not None else []
        content = loader.construct_document(node) if node is not None and not wrong else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        said = ", ".join(text for text in (error.context, error.problem) if text)
        raise UserError(f"{where}: not valid YAML: {said}; correct the line, or the one before it") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    finally:
        loader.dispose()
    if wrong:
        raise UserError("\n".join(f"{path}, {text}" for text in wrong))
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}; allowed: the sections of docs/config.md")
    return content


def check_files(paths: Sequence[Path]) -> None:
    """Raises UserError for files that another reader would take for something else than they look like."""
    for path in paths:
        read_yaml(path)


def _surprises(root: yaml.Node) -> Iterator[str]:
    """One line for each key that stands twice in a section and each value that is not what it looks like."""
    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an anchor's second use
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield from _repeated_keys(node)
            waiting += [item for pair in reversed(node.value) for item in reversed(pair)]
        elif isinstance(node, yaml.SequenceNode):
            waiting += reversed(node.value)
        elif isinstance(node, yaml.ScalarNode):
            yield from _surprise(node)


def _repeated_keys(section: yaml.MappingNode) -> Iterator[str]:
    lines: dict[str, int] = {}
    for key, _ in section.value:
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                first = lines[key.value]
                yield f"line {line}: the key {key.value!r} stands already in line {first}; remove one"
            lines.setdefault(key.value, line)


def _surprise(node: yaml.ScalarNode) -> Iterator[str]:
    # The C parser says '' for a plain scalar, the other one None.
    if not node.style:
        for tag, pattern, text in SURPRISES:
            if node.tag == TAG + tag and re.fullmatch(pattern, node.value):
                yield f"line {node.start_mark.line + 1}: found {node.value}, but {text}"
                return
