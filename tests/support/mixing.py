"""Makes sources, scans and mixtures for tests through the same functions as the workflow's commands."""

from __future__ import annotations

import json
from pathlib import Path

from tests.archives.test_archives import MAKERS
from workflow_scripts.acquire import step as acquire
from workflow_scripts.config.mixtures import MixtureSpec
from workflow_scripts.merge import step as merge
from workflow_scripts.scan import step as scan


def conversation(image: object = None, question: str = "what is it", answer: str = "a thing", **more) -> dict:
    record = {
        "id": "x",
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }
    if image is not None:
        record["image"] = image
        pictures = len(image) if isinstance(image, list) else 1
        record["conversations"][0]["value"] = "<image>\n" * pictures + question
    return record | more


class DataFolder:
    """A working folder in which sources are made and mixed."""

    def __init__(self, folder: Path):
        self.path = folder
        self.sources: list[Path] = []
        self.scans: list[Path] = []

    def annotations(self, name, records, text=None, suffix="json"):
        path = self.path / f"{name}.{suffix}"
        path.write_text(json.dumps(records) if text is None else text)
        self.source(name, {"kind": "path", "annotations": str(path)})
        return path

    def images(self, name, kind, members):
        path = MAKERS[kind](
            self.path / (name if kind == "folder" else f"{name}.{kind}"), list(members.items())
        )
        self.source(name, {"kind": "path", "images": str(path)})
        return path

    def source(self, name, spec):
        source = self.path / "data" / "sources" / name / "manifest.json"
        scanned = self.path / "data" / "scans" / name / "manifest.json"
        acquire.main(["--name", name, "--spec", json.dumps(spec), "--manifest", str(source)])
        scan.main(["--source", str(source), "--manifest", str(scanned), "--threads", "1"])
        if source not in self.sources:
            self.sources.append(source)
            self.scans.append(scanned)

    def mix(self, *parts, name="M", **more):
        spec = MixtureSpec.model_validate({"parts": list(parts), **more})
        manifest = self.path / "data" / "mixtures" / name / "manifest.json"
        return merge.merge(name, spec, self.sources, self.scans, manifest)

    @property
    def mixture(self):
        return self.path / "data" / "mixtures" / "M"


LOOSE = {"max_dropped_share": 1.0}
