"""Writes what is generated from the typed configuration: the JSON schema and the reference page.

`python -m workflow_scripts.config.reference` writes both; `--check` only says whether they are up to date.
Editors that read a `# yaml-language-server: $schema=` line complete and check configuration files with the
schema.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llava_ext.files import write_text
from llava_ext.model.interventions import DEFAULTS, ROLES, description
from workflow_scripts.command_line import command_line
from workflow_scripts.config.base import StrictModel
from workflow_scripts.config.schema import Config
from workflow_scripts.io import UserError, user_errors

ROOT = Path(__file__).parents[2]
SCHEMA, PAGE, FLAGS_PAGE = "config/schema.json", "docs/config.md", "docs/interventions.md"
TABLE_BEGIN, TABLE_END = "<!-- written by `make docs` -->\n", "<!-- end of what `make docs` writes -->\n"
INTRODUCTION = """# Configuration reference

This page is generated from the typed configuration (`workflow_scripts/config/`); `make docs` writes it
again. A key that is not listed here is an error. `config/config.yaml` is the demo,
`config/llava-v1.5-7b.yaml` the full scale; `snakemake -n --configfile FILE` checks a file and shows what
it would do. `--configfile` takes every word behind it, so targets stand before it: `snakemake
experiments/vanilla/checkpoint.json --configfile FILE`.

Relative paths are relative to the working folder.

What YAML reads differently from what it looks like is refused with its line: the same key twice, `0600`
(octal), `1:30` (base 60), `yes`, `no`, `on`, `off` (booleans), dates without quotes. `python -m
workflow_scripts.plan --configfile FILE` also names the line of a syntax error, which Snakemake's own
reader does not.
"""


def _below(model: type[StrictModel]) -> Iterator[type[StrictModel]]:
    for found in model.__subclasses__():
        yield found
        yield from _below(found)


def field_docs(model: type[StrictModel]) -> dict[str, str]:
    """The docstrings behind the fields of a section, its bases' too, by field."""
    found: dict[str, str] = {}
    for item in (*reversed(model.__mro__), model.documented_like):
        if item is not None and item.__module__.startswith("workflow_scripts."):
            with suppress(OSError):  # made without a text of its own
                found |= dict(_docs_in(inspect.getsource(item)))
    return found


def _docs_in(source: str) -> Iterator[tuple[str, str]]:
    (section,) = ast.parse(textwrap.dedent(source)).body
    assert isinstance(section, ast.ClassDef)
    for field, doc in itertools.pairwise(section.body):
        match field, doc:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, inspect.cleandoc(text)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file."""
    schema = Config.model_json_schema()
    known = {model.__name__: model for model in _below(StrictModel)}
    for name, section in {"Config": schema, **schema["$defs"]}.items():
        docs = field_docs(known[name]) if name in known else {}
        for key, field in section.get("properties", {}).items():
            if key in docs and "description" not in field:
                section["properties"][key] = dict(sorted({**field, "description": docs[key]}.items()))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "llava-spatial-workflow configuration",
        **schema,
    }


def type_name(field: dict[str, Any]) -> str:
    """A field's type in plain English, with its limits; sections are links."""
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    options = field.get("anyOf") or field.get("oneOf")
    if options:
        return " or ".join(
            dict.fromkeys(type_name(option) for option in options if option.get("type") != "null")
        )
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return " \\| ".join(f"`{value}`" for value in field["enum"])
    kind = field.get("type")
    if kind == "array":
        items = field.get("items") or {}
        return f"list of {type_name(items)}" if items else "list"
    if kind == "object":
        values = field.get("additionalProperties") or next(
            iter(field.get("patternProperties", {}).values()), None
        )
        return f"name: {type_name(values)}" if isinstance(values, dict) else "section"
    names = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}
    return f"{names.get(str(kind), 'any')}{_limits(field)}"


def _limits(field: dict[str, Any]) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    found = [f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field]
    return f" {' and '.join(found)}" if found else ""


def _default(name: str, field: dict[str, Any], required: Sequence[str]) -> str:
    if name in required:
        return "**required**"
    value = field.get("default")
    if "default" not in field or value in ({}, []):
        return ""
    return f"`{json.dumps(value)}`"


def _section(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"\n## {name}\n"
    if schema.get("description"):
        yield " ".join(schema["description"].split()) + "\n"
    yield "| key | type | default | meaning |\n| --- | --- | --- | --- |"
    for key, field in schema.get("properties", {}).items():
        meaning = " ".join(field.get("description", "").split()).replace("|", "\\|")
        yield (
            f"| `{key}` | {type_name(field)} | {_default(key, field, schema.get('required', []))} |"
            f" {meaning} |"
        )


def reference_page() -> str:
    """The reference page as Markdown."""
    schema = json_schema()
    lines = [INTRODUCTION, *_section("Config", schema)]
    for name, section in schema["$defs"].items():
        if section.get("type") == "object":
            lines += _section(name, section)
    return "\n".join(lines) + "\n"


def flag_table() -> str:
    """The interventions as Markdown: one row a flag, with the settings that go with it."""
    lines = ["| flag | settings (default) | needs a grid | in run folders | meaning |", "| --- " * 5 + "|"]
    for name, role in ROLES.items():
        if role.flag is None:
            values = [f"`{key}` (`{json.dumps(DEFAULTS[key])}`)" for key in ROLES if ROLES[key].flag == name]
            row = [f"`{name}`", ", ".join(values), "yes" if role.needs_grid else "", f"`{role.short}`"]
            lines.append(f"| {' | '.join([*row, description(name)])} |")
    return "\n".join(lines) + "\n"


def _with_flag_table(page: str) -> str:
    before, begin, rest = page.partition(TABLE_BEGIN)
    _, end, after = rest.partition(TABLE_END)
    if not end:
        raise UserError(
            f"{FLAGS_PAGE}: the marks around its table are gone; put back {TABLE_BEGIN}{TABLE_END}"
        )
    return before + begin + flag_table() + end + after


def generated() -> dict[str, str]:
    """The generated files' texts by path."""
    return {
        SCHEMA: json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n",
        PAGE: reference_page(),
        FLAGS_PAGE: _with_flag_table((ROOT / FLAGS_PAGE).read_text(encoding="utf-8")),
    }


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Writes or checks the generated files."""
    parser = command_line("config.reference", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is out of date")
    arguments = parser.parse_args(argv)
    for name, text in generated().items():
        path = ROOT / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if arguments.check:
            raise UserError(f"{name} is out of date; run `make docs`")
        write_text(path, text)
        print(f"wrote {name}")


if __name__ == "__main__":
    main()
