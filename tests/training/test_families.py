"""Other families than CLIP + Vicuna, end to end: both stages on the demo's data, killed and resumed,
exported, loaded by others.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.families import make_llm, make_tower, qwen_tokenizer
from tests.support.models import picture
from tests.support.trainings import command_line, environment, losses, run

VARIANT = {
    "normalize_projector": True,
    "normalize_statistics": "auto",
    "use_multilayer_features": True,
    "multilayer_layers": (2, 4),
    "compression_after_projection": True,
    "final_spatial_size": 4,
    "interleave": True,
    "twoD_vision_embedding": True,
}
# In a process that knows nothing of this package: what a vanilla checkpoint, and one with code of its own,
# compute for a picture and a text.
STOCK = """
import sys, numpy, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
picture, vanilla, variant = sys.argv[1:]
for folder, kind, code in (
    (vanilla, LlavaForConditionalGeneration, {}),
    (variant, AutoModelForImageTextToText, {"trust_remote_code": True}),
):
    model = kind.from_pretrained(folder, **code).eval()
    batch = AutoProcessor.from_pretrained(folder, **code)(
        text="<image>a red circle", images=Image.open(picture), return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    assert not any(name.partition(".")[0] == "llava_ext" for name in sys.modules)
    arrays = {name: value.numpy() for name, value in batch.items()}
    numpy.savez(folder + ".npz", logits=logits.numpy(), **arrays)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The demo's captions and questions, drawn: {split: (annotations, pictures)}."""
    from workflow_scripts.config.shapes import ShapesSource
    from workflow_scripts.demo.shapes import generate

    found = {}
    for split in ("captions", "questions"):
        folder = tmp_path_factory.mktemp(split)
        made = generate(ShapesSource(split=split, pictures=24, archive="folder", seed=2), folder)
        pictures = folder / made["images"]["path"]
        (pictures / "shapes").symlink_to(pictures)  # as the questions' paths begin
        found[split] = folder / made["annotations"][0]["path"], pictures
    return found


def train(stage, output_dir, data, **changes):
    """Four steps, a checkpoint every two; then from the second's checkpoint again, as after a kill: equal
    to the bit.
    """
    annotations, pictures = data
    flags = {
        "data_path": annotations,
        "image_folder": pictures,
        "num_train_epochs": 1,
        "max_steps": 4,
        "save_steps": 2,
        "gradient_accumulation_steps": 1,
    }
    run(command_line(stage, output_dir, **flags | changes), output_dir.with_suffix(".log"))
    again = output_dir.with_name(output_dir.name + "_again")
    again.mkdir()
    shutil.copytree(output_dir / "checkpoint-2", again / "checkpoint-2")
    log = run(command_line(stage, again, **flags | changes), again.with_suffix(".log"))
    assert "continuing from" in log and losses(again) == losses(output_dir)[2:]
    for weights in output_dir.glob("*.safetensors"):
        whole, resumed = load_file(weights), load_file(again / weights.name)
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def seen_by_others(vanilla, variant, tmp_path):
    """Arrays that a fresh process computes with each checkpoint."""
    picture(9).save(tmp_path / "picture.png")
    script = tmp_path / "others.py"
    script.write_text(STOCK, encoding="utf-8")
    command = [sys.executable, script, tmp_path / "picture.png", vanilla, variant]
    env = environment(HF_MODULES_CACHE=str(tmp_path / "modules"), PYTHONPATH="", HF_HUB_OFFLINE="1")
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [np.load(f"{folder}.npz") for folder in (vanilla, variant)]


def ours(folder, arrays):
    """The logits of the same batch, by this package."""
    from llava_ext.checkpoints.stored import load_model

    model, _, _ = load_model(folder)
    with torch.no_grad():
        batch = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "logits"}
        return model.eval()(**batch).logits.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["siglip_qwen2", "dinov2_llama"])
def test_both_stages_of_another_family_resume_and_load_elsewhere(family, data, llm, tmp_path):
    from llava_ext.checkpoints.stored import save_checkpoint
    from llava_ext.model.build import build_model
    from llava_ext.model.interventions import Interventions

    if family == "siglip_qwen2":
        folders = {"vision_tower": make_tower(tmp_path / "tower", "siglip_vision_model")}
        tokenizer = qwen_tokenizer()
        qwen = make_llm(tmp_path / "llm", "qwen2", tokenizer, tie_word_embeddings=True)  # as Qwen's 0.5B
        folders["model_name_or_path"] = qwen
        second = {"version": "chat", "data": data["questions"]}
    else:
        folders = {"vision_tower": make_tower(tmp_path / "tower", "dinov2"), "model_name_or_path": llm}
        second = {"version": "v1", "data": data["questions"]}
    train(1, tmp_path / "stage1", data["captions"], **folders)
    second |= folders | {"pretrain_mm_mlp_adapter": tmp_path / "stage1"}
    train(2, tmp_path / "stage2", second.pop("data"), **second)

    config = json.loads((tmp_path / "stage2" / "config.json").read_text())
    assert config["model_type"] == "llava" and not list((tmp_path / "stage2").glob("*.py"))
    parts = folders["model_name_or_path"], folders["vision_tower"]
    model, tokenizer, processor = build_model(*parts, Interventions(**VARIANT))
    model.generation_config.do_sample = True
    save_checkpoint(model, tokenizer, processor, tmp_path / "variant", "plain", "pad")
    vanilla, variant = seen_by_others(tmp_path / "stage2", tmp_path / "variant", tmp_path)
    for folder, arrays in (("stage2", vanilla), ("variant", variant)):
        mine = ours(tmp_path / folder, arrays)
        assert np.abs(arrays["logits"][..., : mine.shape[-1]] - mine).max() < 1e-4
    assert (vanilla["input_ids"] == config["image_token_index"]).sum() == 16
    assert (variant["input_ids"] == model.config.image_token_id).sum() == 4
