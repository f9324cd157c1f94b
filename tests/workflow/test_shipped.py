"""The shipped configurations of other sizes run: each as its file says it, with tiny models and tiny data
under the names of the real ones, on the CPU.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support.workspace import ROOT, Workspace, draw_questions
from workflow_scripts.config.load import extended
from workflow_scripts.config.shapes import ShapesLlm, ShapesSource, ShapesTower
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.demo.models import build
from workflow_scripts.demo.shapes import generate

pytestmark = pytest.mark.slow

RECORDS = {"pretrain": 64, "finetune": 24}
BATCHES = {"pretrain": 32, "finetune": 8}
WIDTHS = {"vicuna_7b": 32, "vicuna_13b": 48}
# What takes the place of the real sizes; all else is the file's own.
CPU = {"gpus_per_node": 0, "cpus": 1, "mem_mb": 2500, "runtime_min": 20, "save_before_end_s": 30,
       "tf32": False, "dataloader_workers": 0}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with the stand-ins for Vicuna, CLIP and LLaVA's data."""
    folder = tmp_path_factory.mktemp("shipped")
    for name, width in WIDTHS.items():
        build(ShapesLlm(hidden_size=width, intermediate_size=64, layers=2), folder / "given" / name)
    build(ShapesTower(steps=0, layers=2), folder / "given" / "clip_l_336")
    draw_questions(folder / "mine", RECORDS["finetune"] - 8)  # and 8 of text alone
    generate(ShapesSource(split="captions", pictures=RECORDS["pretrain"]), folder / "captions")
    records = json.loads((folder / "mine/questions.json").read_text())
    for record in records:
        if "image" in record:
            record["image"] = record["image"].replace("shapes/", "coco/train2017/")
    (folder / "mine/llava_v1_5_mix665k.json").write_text(json.dumps(records))
    return folder


def tiny_parts(parts, records):
    """The parts of a mixture as shipped, with the images of COCO alone, and a subset of the same share."""
    for part in parts:
        part["images"] = [image for image in part["images"] if image["prefix"] in ("", "coco/train2017")]
        if "samples" in part:
            part["samples"] = round(records * part["samples"] / 100_000)
        part["expected_records"] = records
    return parts


def shrunk(name, **compute):
    """A shipped configuration with all that it extends, and what is large about it replaced."""
    shipped = ROOT / f"config/llava-v1.5-{name}.yaml"
    config = extended(read_yaml(shipped), [shipped])
    for stage, values in config["stages"].items():
        tiny_parts(config["mixtures"][values["mixture"]]["parts"], RECORDS[stage])
        values["global_batch_size"] = BATCHES[stage]
    captions = {"images": "captions/images.zip", "annotations": ["captions/captions.json"]}
    config["sources"] = {
        "llava_pretrain": {"kind": "path", **captions},
        "llava_instruct": {"kind": "path", "annotations": ["mine/llava_v1_5_mix665k.json"]},
        "coco": {"kind": "path", "images": "mine/images.tar"},
    }
    config["models"] = {
        model: {"kind": "path", "path": f"given/{model}", "role": role}
        for role, model in config["model"].items()
        if role in ("llm", "vision_tower")
    }
    used = {stage["compute"] for stage in config["stages"].values()}
    config["compute"] = {kind: {**config["compute"][kind], **CPU, **compute} for kind in used}
    used = {stage["mixture"] for stage in config["stages"].values()}
    config["mixtures"] = {mixture: config["mixtures"][mixture] for mixture in used}
    config["experiments"] = {"vanilla": config["experiments"]["vanilla"]}
    del config["evaluation"]
    return config


def trained(folder, name, **compute):
    """Runs one of the files to its stage 2; the workspace, and the states of both stages."""
    workspace = Workspace(folder, warm=True)
    workspace.config = shrunk(name, **compute)
    workspace.run(workspace.plan().run("finetune", "vanilla").manifest)
    return workspace, {stage: workspace.state(stage, "vanilla") for stage in ("pretrain", "finetune")}


def flags(state):
    """The training's command line, as flags and values."""
    words = json.loads((state / "spec.json").read_text())["command"][3:]
    return dict(zip(words[::2], words[1::2], strict=True))


def learnt(state, base):
    """The weights of the LLM that stage 2 has changed, by their last names."""
    before, after = load_file(base / "model.safetensors"), load_file(state / "model.safetensors")
    names = {name.removeprefix("model."): name for name in before}
    mine = {name.removeprefix("model.").removeprefix("language_model."): name for name in after}
    mine = {name.removeprefix("model."): full for name, full in mine.items()}
    rows = {key: min(len(before[names[key]]), len(after[mine[key]])) for key in names}
    return {
        key.split(".")[-2]
        for key, count in rows.items()
        if not torch.equal(before[names[key]][:count].bfloat16(), after[mine[key]][:count].bfloat16())
    }


LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("name", "mixtures"),
    [("7b-lora", {}), ("7b-quick", {"llava_60k": 38, "llava_50k": 12})],  # 60,000 and 50,000 of 100,000
)
def test_lora_on_one_card(name, mixtures, tiny):
    """`-7b-lora`, and `-7b-quick`, which is the same on a part of the data: its samples, rates, ranks and
    kernels reach the checkpoint.
    """
    workspace, states = trained(tiny, name, per_device_batch_size=4)
    for mixture, records in mixtures.items():
        assert workspace.json(f"data/mixtures/{mixture}/manifest.json")["records"] == records
    assert set(learnt(states["finetune"], tiny / "given/vicuna_7b")) == LINEAR  # no norm, no embedding
    given = flags(states["finetune"])
    assert (given["--lora_r"], given["--lora_alpha"], given["--lora_dropout"]) == ("128", "256", "0.05")
    assert (given["--learning_rate"], given["--mm_projector_lr"]) == ("0.0002", "2e-05")
    assert given["--gradient_accumulation_steps"] == "2"
    for state in states.values():
        said = json.loads((state / "run_identity.json").read_text())
        assert (said["attn_implementation"], said["pack"], said["bf16"]) == ("varlen", True, True)
        assert flags(state)["--checkpoint_layers"] == "auto"


def test_lora_differs_from_its_subset_in_data_alone():
    """So what the subset has shown holds for `-7b-lora`: no other key of the two stages is another."""
    lora, quick = (shrunk(name, per_device_batch_size=4) for name in ("7b-lora", "7b-quick"))
    theirs = {"mixture": "llava_60k"}, {"mixture": "llava_50k", "save_steps": 100}
    for stage, changes in zip(("pretrain", "finetune"), theirs, strict=True):
        assert quick["stages"][stage] == lora["stages"][stage] | changes
    changed = {
        key for key, value in quick["compute"]["one_gpu"].items() if value != lora["compute"]["one_gpu"][key]
    }
    assert changed == {"gpu_gb", "expected_hours"}
    assert quick["model"] == lora["model"]


def test_the_larger_model_on_its_engines(tiny):
    """`-13b`: the other LLM, ZeRO-2 and then ZeRO-3, its own micro-batch, everything trained."""
    _, states = trained(tiny, "13b")
    for state in states.values():
        assert json.loads((state / "spec.json").read_text())["spec"]["model"]["llm"] == "vicuna_13b"
    config = json.loads((states["finetune"] / "config.json").read_text())
    assert config["text_config"]["hidden_size"] == WIDTHS["vicuna_13b"]
    assert flags(states["pretrain"])["--deepspeed"] == "zero2.json"
    given = flags(states["finetune"])
    assert (given["--deepspeed"], given["--per_device_train_batch_size"]) == ("zero3.json", "8")
    assert learnt(states["finetune"], tiny / "given/vicuna_13b") >= LINEAR | {"lm_head", "embed_tokens"}
