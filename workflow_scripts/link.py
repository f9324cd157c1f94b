"""Gives a finished checkpoint its experiment's name: `experiments/<name>/checkpoint.json`, with links beside
it.

`checkpoint.json` is what a downstream workflow depends on; its paths are relative to its own folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workflow_scripts.command_line import command_line
from workflow_scripts.io import read_json, user_errors, write_json
from workflow_scripts.stages import STAGES


def relative_link(link: Path, target: Path) -> None:
    """A relative symbolic link that replaces an older one in one step, so that the whole folder can be
    moved.
    """
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()))
    if link.is_dir() and not link.is_symlink():
        raise IsADirectoryError(f"{link} is a folder, not a link: move it away")
    temporary.replace(link)


def link_experiment(
    spec: Mapping[str, Any], trained: Mapping[str, Path], export: Path, manifest: Path
) -> dict[str, Any]:
    """Makes the links and writes `checkpoint.json`; ``trained`` are the manifests by stage, none for a
    checkpoint that was not trained here.
    """
    folder = manifest.parent
    folder.mkdir(parents=True, exist_ok=True)
    stages = {name: (path.parent, read_json(path)) for name, path in trained.items()}
    exported = read_json(export)
    targets = {name: home / content["folder"] for name, (home, content) in stages.items()}
    targets |= {name: export.parent / place for name, place in exported["folders"].items()}
    for name, target in targets.items():
        relative_link(folder / name, target)
    content = {
        **spec,
        **{key: exported[key] for key in ("origin", "interventions") if "origin" in exported},
        "paths": {
            name: os.path.relpath(target.resolve(), folder.resolve()) for name, target in targets.items()
        },
        "loads_with": exported["loads_with"],
        "digest": exported["digest"],
        "training": {
            name: {
                "digest": found["digest"],
                "step": found["step"],
                "metrics": found["metrics"],
                "inputs": found["inputs"],
                **({"skipped": found["skipped"]} if "skipped" in found else {}),
            }
            for name, (_, found) in stages.items()
        },
    }
    write_json(manifest, content)
    return content


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Links one experiment."""
    paths = {
        "export": "the manifest of the export",
        "manifest": "the experiment's checkpoint.json, to be written",
    }
    texts = {"spec": "what `Plan.checkpoint_spec` gives, as JSON"}
    parser = command_line("link", __doc__, texts, paths)
    for name in STAGES:
        parser.add_argument(f"--{name}", type=Path, help=f"the manifest of the {name} run, if there is one")
    options = parser.parse_args(argv)
    trained = {name: path for name in STAGES if (path := getattr(options, name)) is not None}
    link_experiment(json.loads(options.spec), trained, options.export, options.manifest)


if __name__ == "__main__":
    main()
