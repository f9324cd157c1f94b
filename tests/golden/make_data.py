"""Makes `data/`, the small copy of a folder of golden vectors: `python tests/golden/make_data.py FOLDER`.

Kept: all texts, both tokenizers, the language model, the first vision tower and what was recorded with it in
the configurations below, the clipped trainings, sampling orders, generations from stage-1 projectors. Left
out: the second tower, the other configurations, the finished checkpoint.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
WHOLE = ("tokenizer", "tokenizer_alt", "llm", "text", "sampler")
RECORDINGS = [
    "van_mlp2x__mix",
    "van_mlp2x__special",
    "van_mlp2x__textonly",
    "van_cls_patch__plain",
    "van_layer_m1__plain",
    "van_linear__plain",
    "van_mlp3x__plain",
    "van_mlp2x_maxlen12__special",
    "van_mlp2x_maxlen40_nanloss__mix",
    "van_mlp2x_leftpad__special",
    "van_mlp2x_imglist2crops__plain",
    "fork_normalize__special",
    "fork_normalize_multilayer__mix",
    "fork_compress_s2__plain",
    "fork_compress_s3__plain",
    "fork_spatial__special",
    "fork_normalize_multilayer_compress_s2__plain",
    "fork_interleave_cfg4__plain",
    "fork_interleave_forced3__plain",
    "fork_interleave_maxlen64__mix",
    "fork_twod__special",
    "fork_rearrange__plain",
    "fork_registers__plain",
]


def main(source: Path) -> None:
    """Rebuilds the copy from ``source``."""
    shutil.rmtree(DATA, ignore_errors=True)
    for name in WHOLE:
        shutil.copytree(source / name, DATA / name)
    tower = json.loads((source / "model" / "index_van.json").read_text())["recordings"][0]["tower"]
    shutil.copytree(source / tower, DATA / tower)
    _images(source, tower)
    _batches(source, tower)
    _model(source)
    _training(source)
    for path in DATA.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _images(source: Path, tower: str) -> None:
    (DATA / "images").mkdir()
    for path in (source / "images").glob("*.png"):
        shutil.copy(path, DATA / "images")
    shutil.copy(source / "images/index.json", DATA / "images")
    with np.load(source / "images/pixel_values.npz") as stored:
        kept = {name: stored[name] for name in stored.files if name.startswith(f"{tower}/")}
    np.savez_compressed(DATA / "images/pixel_values.npz", **kept)
    log = json.loads((source / "images/pixel_values_log.json").read_text())
    _write(DATA / "images/pixel_values_log.json", [entry for entry in log if entry["tower"] == tower])


def _batches(source: Path, tower: str) -> None:
    (DATA / "batches").mkdir()
    for path in [*(source / "batches").glob(f"*__{tower}.npz"), source / "batches/index.json"]:
        shutil.copy(path, DATA / "batches")


def _model(source: Path) -> None:
    for name in ("model", "projectors"):
        (DATA / name).mkdir()
    for index in (source / "model").glob("index_*.json"):
        content = json.loads(index.read_text())
        content["recordings"] = [
            entry for entry in content["recordings"] if Path(entry["file"]).stem in RECORDINGS
        ]
        _write(DATA / "model" / index.name, content)
        for entry in content["recordings"]:
            shutil.copy(source / entry["file"], DATA / "model")
            weights = f"{index.stem.removeprefix('index_')}_{entry['config']}.safetensors"
            if (source / "projectors" / weights).is_file():
                shutil.copy(source / "projectors" / weights, DATA / "projectors")
    for path in (source / "projectors").glob("*_mlp2x.safetensors"):
        shutil.copy(path, DATA / "projectors")


def _training(source: Path) -> None:
    shutil.copytree(source / "train", DATA / "train", ignore=shutil.ignore_patterns("*_noclip*"))
    (DATA / "generation").mkdir()
    for path in (source / "generation").glob("*_stage1_projector_*"):
        shutil.copy(path, DATA / "generation")
    (DATA / "artefacts").mkdir()
    for path in (source / "artefacts").glob("*"):
        shutil.copy(path, DATA / "artefacts")


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
