"""A source that is drawn on this machine: the demo's coloured shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workflow_scripts.acquire.local_files import describe_file, describe_folder
from workflow_scripts.config.shapes import ShapesSource
from workflow_scripts.demo.shapes import generate


def draw_source(spec: ShapesSource, folder: Path) -> dict[str, Any]:
    """Draws it and returns the content of the manifest."""
    found = generate(spec, folder)
    images = folder / found["images"]["path"]
    paths = [folder / item["path"] for item in found["annotations"]]
    if images.is_dir():
        files = [describe_folder(images, found["images"]["path"], content=True)]
    else:
        files = [describe_file(images, found["images"]["path"])]
    files += [describe_file(path, path.name) for path in paths]
    return {**found, "files": files}
