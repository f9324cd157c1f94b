"""Small folders that many tests of the demo need, made once for the session."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from llava_ext.files import sha256
from workflow_scripts.config.shapes import ShapesLlm, ShapesSource, ShapesTower
from workflow_scripts.io import write_json


def members(folder: Path, images: dict) -> dict[str, bytes]:
    """A generated source's pictures, read by the standard library."""
    path = folder / images["path"]
    if images["type"] == "zip":
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            return {name: archive.read(name) for name in archive.namelist()}
    if images["type"] == "tar":
        with tarfile.open(path) as archive:
            return {member.name: archive.extractfile(member).read() for member in archive}
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="session")
def damaged(tmp_path_factory):
    """A source with every kind of damage: (spec, folder, what generate returned)."""
    from workflow_scripts.demo.shapes import generate

    counts = {
        "truncated": 3,
        "corrupt": 6,
        "gif_as_jpg": 2,
        "png_as_jpg": 2,
        "html_as_jpg": 2,
        "empty": 2,
        "missing": 3,
    }
    spec = ShapesSource(split="questions", pictures=120, archive="zip", seed=5, text_only=4, damage=counts)
    folder = tmp_path_factory.mktemp("damaged")
    return spec, folder, generate(spec, folder)


@pytest.fixture(scope="session")
def held_out(tmp_path_factory):
    """A test source with its manifest, as the acquire step writes it: (folder, manifest path)."""
    from workflow_scripts.demo.shapes import generate

    folder = tmp_path_factory.mktemp("held_out")
    made = generate(ShapesSource(split="test", pictures=30, archive="zip", seed=3), folder)
    write_json(
        folder / "manifest.json",
        {"name": "shapes_test", "kind": "shapes", "digest": "d", "files": [], **made},
    )
    return folder, folder / "manifest.json"


@pytest.fixture(scope="session")
def llm(tmp_path_factory):
    """The demo's language model's folder."""
    from workflow_scripts.demo.models import build

    folder = tmp_path_factory.mktemp("models") / "llm"
    build(ShapesLlm(seed=1), folder)
    return folder


@pytest.fixture(scope="session")
def tower(tmp_path_factory):
    """The demo's vision tower's folder, trained for half as long as in the demo."""
    from workflow_scripts.demo.models import build

    folder = tmp_path_factory.mktemp("models") / "tower"
    build(ShapesTower(seed=1, steps=100), folder)
    return folder


def write_export(folder: Path, llm: Path, tower: Path, interventions: dict) -> Path:
    """An untrained checkpoint, exported as the export step does; returns its manifest."""
    import torch

    from llava_ext.checkpoints.stored import save_checkpoint
    from llava_ext.model.build import build_model
    from llava_ext.model.interventions import Interventions

    torch.manual_seed(0)
    flags = Interventions.from_mapping(interventions)
    model, tokenizer, processor = build_model(llm, tower, flags, image_aspect_ratio="pad")
    # The repair that the prepare step makes: without it no checkpoint can be saved.
    model.generation_config.do_sample = True
    save_checkpoint(model, tokenizer, processor, folder / "x" / "hf", "v1", "pad")
    hf = {
        f.relative_to(folder / "x" / "hf").as_posix(): sha256(f)
        for f in (folder / "x" / "hf").rglob("*")
        if f.is_file()
    }
    manifest = {"run": "r-1", "folder": "x", "folders": {"hf": "x/hf"}, "digest": "e", "files": {"hf": hf}}
    write_json(folder / "manifest.json", {**manifest, "interventions": interventions})
    return folder / "manifest.json"


@pytest.fixture(scope="session")
def stock_export(tmp_path_factory, llm, tower):
    """An untrained vanilla checkpoint, exported."""
    return write_export(tmp_path_factory.mktemp("stock"), llm, tower, {})


@pytest.fixture(scope="session")
def compressed_export(tmp_path_factory, llm, tower):
    """An untrained checkpoint with interventions and saved code, exported."""
    flags = {
        "normalize_projector": True,
        "normalize_statistics": "auto",
        "compression_after_projection": True,
    }
    return write_export(tmp_path_factory.mktemp("compressed"), llm, tower, flags | {"final_spatial_size": 4})


def load_json(path: Path):
    return json.loads(path.read_text())


def pixels(data: bytes):
    """A picture's pixels (height, width, 3) as floats."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float64)
