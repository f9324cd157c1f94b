"""The version of the training code, a part of every run's name.

Raise ``CODE_VERSION`` when a change gives other numbers for the same configuration: every run then gets a new
name and is trained again, beside the old one. Comments, docs, messages and speed are no reason. A test
compares the digest of the code that makes the numbers with ``CODE_DIGEST`` and reminds whoever changes it to
decide; ``python -m workflow_scripts.code_version --update`` records the decision.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts.command_line import command_line

CODE_VERSION = 3
CODE_DIGEST = "2f96e5dc0620e748"

# The modules whose code decides what a training computes.
NUMERIC = (
    "llava_ext/model/interventions.py",
    "llava_ext/model/poolings.py",
    "llava_ext/model/towers.py",
    "llava_ext/model/projectors.py",
    "llava_ext/model/language_models.py",
    "llava_ext/model/configuration_spatial_llava.py",
    "llava_ext/model/modeling_spatial_llava.py",
    "llava_ext/model/processing_spatial_llava.py",
    "llava_ext/data/templates.py",
    "llava_ext/data/image_token.py",
    "llava_ext/data/chat.py",
    "llava_ext/data/conversation.py",
    "llava_ext/data/images.py",
    "llava_ext/data/assembly.py",
    "llava_ext/model/build.py",
    "llava_ext/model/folders.py",
    "llava_ext/model/parts.py",
    "llava_ext/checkpoints/stored.py",
    "llava_ext/training/precision.py",
    "llava_ext/data/dataset.py",
    "llava_ext/data/sampler.py",
    "llava_ext/training/optimizer.py",
    "llava_ext/training/trainer.py",
    "llava_ext/training/lora.py",
    "llava_ext/data/record_view.py",
    "llava_ext/data/samples.py",
    "llava_ext/training/setup.py",
    "workflow_scripts/launch/command.py",
)


def _without_docs(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                item
                for item in body
                if not (
                    isinstance(item, ast.Expr)
                    and isinstance(item.value, ast.Constant)
                    and isinstance(item.value.value, str)
                )
            ]
    return tree


def code_digest(root: Path) -> str:
    """The digest of the numeric modules' code, whatever their comments, docstrings and line breaks."""
    sha = hashlib.sha256()
    for name in NUMERIC:
        path = root / name
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        sha.update(f"{name}\n{ast.unparse(_without_docs(ast.parse(text)))}\n".encode())
    return sha.hexdigest()[:16]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints whether the recorded digest still holds, or records the present one."""
    parser = command_line("code_version", __doc__)
    parser.add_argument(
        "--update", action="store_true", help="record the present code as belonging to CODE_VERSION"
    )
    arguments = parser.parse_args(argv)
    here = Path(__file__)
    found = code_digest(here.parent.parent)
    print(f"version {CODE_VERSION}, recorded {CODE_DIGEST or 'nothing'}, present {found}")
    if arguments.update:
        text = re.sub(
            r'^CODE_DIGEST = ".*"$', f'CODE_DIGEST = "{found}"', here.read_text(encoding="utf-8"), flags=re.M
        )
        here.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
