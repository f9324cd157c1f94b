"""Makes one source: fetches it, draws it, or looks at what is already there, and describes it in a manifest.

python -m workflow_scripts.acquire --name N --spec '<JSON of the source>' --manifest
data/sources/N/manifest.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow_scripts.command_line import command_line, read_spec
from workflow_scripts.config.sources import Source
from workflow_scripts.io import digest, user_errors, write_json
from workflow_scripts.sources import KINDS, SourceSpec


def acquire(name: str, spec: Source, manifest: Path) -> dict[str, Any]:
    """Makes the source and writes its manifest, last of all."""
    folder = manifest.parent
    folder.mkdir(parents=True, exist_ok=True)
    found = KINDS[spec.kind].make(spec, folder)
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


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Makes one source."""
    texts = {"name": "the source's name", "spec": "the source's section of the config, as JSON"}
    paths = {"manifest": "the source's manifest, to be written"}
    options = command_line("acquire", __doc__, texts, paths).parse_args(argv)
    result = acquire(options.name, read_spec(SourceSpec, options.spec), options.manifest)
    print(f"{options.name}: {len(result['files'])} files described in {options.manifest}", file=sys.stderr)


if __name__ == "__main__":
    main()
