"""Makes one source: fetches it, draws it, or looks at what is already there, and describes it in a manifest.

python -m workflow_scripts.acquire --name N --spec '<JSON of the source>' --manifest data/sources/N/manifest.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from workflow_scripts.config.shapes import ShapesSource
from workflow_scripts.config.sources import HubSource, PathSource, UrlSource, source_spec
from workflow_scripts.io import UserError, digest, user_errors, write_json

Spec = HubSource | UrlSource | PathSource | ShapesSource


def acquire(name: str, spec: Spec, manifest: Path) -> dict[str, Any]:
    """Makes the source and writes its manifest, last of all."""
    folder = manifest.parent
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(spec, ShapesSource):
        found = _draw(spec, folder)
    elif isinstance(spec, PathSource):
        from workflow_scripts.acquire.local_files import describe_local

        found = describe_local(spec, folder)
    else:
        from workflow_scripts.acquire.remote_files import fetch_source

        found = fetch_source(spec, folder)
    found.setdefault("images", None)
    found.setdefault("annotations", [])
    result = {"name": name, "kind": spec.kind, **found, "digest": content_digest(found)}
    expected = getattr(spec, "expected_images", None)
    if expected is not None:
        result["expected_images"] = expected
    write_json(manifest, result)
    return result


def content_digest(found: dict[str, Any]) -> str:
    """Digest of the files' names and content, not of where they are."""
    files = [[Path(item["path"]).name, item.get("sha256") or item["identity"]] for item in found["files"]]
    return digest({"images": (found["images"] or {}).get("type"), "files": sorted(files)})


def _draw(spec: ShapesSource, folder: Path) -> dict[str, Any]:
    from workflow_scripts.demo.shapes import generate

    found = generate(spec, folder)
    from workflow_scripts.acquire.local_files import describe_file, describe_folder

    images = folder / found["images"]["path"]
    paths = [folder / item["path"] for item in found["annotations"]]
    if images.is_dir():
        files = [describe_folder(images, found["images"]["path"], content=True)]
    else:
        files = [describe_file(images, found["images"]["path"])]
    files += [describe_file(path, path.name) for path in paths]
    return {**found, "files": files}


def main(argv: Sequence[str] | None = None) -> None:
    """Makes one source."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow_scripts.acquire",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--name", required=True, help="the source's name")
    parser.add_argument("--spec", required=True, help="the source's section of the config, as JSON")
    parser.add_argument("--manifest", required=True, type=Path, help="the source's manifest, to be written")
    options = parser.parse_args(argv)
    with user_errors():
        try:
            spec = source_spec.validate_json(options.spec)
        except ValidationError as error:
            raise UserError(f"--spec: {error}") from None
        result = acquire(options.name, spec, options.manifest)
        print(
            f"{options.name}: {len(result['files'])} files described in {options.manifest}", file=sys.stderr
        )


if __name__ == "__main__":
    main()
