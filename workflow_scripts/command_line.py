"""What the command lines of the steps share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workflow_scripts.io import UserError

NOTHING: Mapping[str, str] = {}


def command_line(
    module: str, doc: str | None, texts: Mapping[str, str] = NOTHING, paths: Mapping[str, str] = NOTHING
) -> argparse.ArgumentParser:
    """A parser for `python -m workflow_scripts.<module>`, explained by ``doc`` as it is laid out.

    ``texts`` and ``paths`` are the options that must be given, with their help.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m workflow_scripts.{module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, explained in texts.items():
        parser.add_argument(f"--{name}", required=True, help=explained)
    for name, explained in paths.items():
        parser.add_argument(f"--{name}", required=True, type=Path, help=explained)
    return parser


def read_spec(model: Any, text: str) -> Any:
    """The option ``--spec``: JSON that the pydantic ``model`` (or union of models) accepts. Raises
    UserError.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(model).validate_json(text)
    except ValidationError as error:
        wrong = error.errors(include_input=False, include_url=False)  # an input may be a signed URL
        lines = [".".join(map(str, item["loc"])) + f": {item['msg']}" for item in wrong]
        raise UserError(f"--spec: {'; '.join(lines)}") from None
