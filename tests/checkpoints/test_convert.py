"""Checkpoints between the HF layout and the original one: nothing is lost, nothing is mistaken for
something else.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_ext import convert
from llava_ext.checkpoints import keys, original, tensors
from llava_ext.checkpoints.stored import load_model, save_checkpoint
from llava_ext.errors import TrainingError
from llava_ext.model.build import build_model
from llava_ext.model.folders import load_tokenizer
from llava_ext.model.interventions import Interventions
from llava_ext.training.flag_options import take_interventions
from tests.support.trainings import GOLDEN

LLM, TOWER = GOLDEN / "llm", GOLDEN / "clip_g4"

VARIANTS = {
    "vanilla": {},
    "normalize": {"normalize_projector": True},
    "normalize_auto": {"normalize_projector": True, "normalize_statistics": "auto"},
    "multilayer": {"use_multilayer_features": True, "multilayer_layers": (3, 9)},
    "compression": {"compression_after_projection": True, "final_spatial_size": 4},
    "coordinates": {"add_spatial_coordinates": True},
    "interleave": {"interleave": True, "interleave_sparsity": 2},
    "positions": {"twoD_vision_embedding": True},
    "published": {"compression_after_projection": True, "final_spatial_size": 3, "published_behaviour": True},
    "all": {
        "normalize_projector": True,
        "use_multilayer_features": True,
        "compression_after_projection": True,
        "final_spatial_size": 4,
        "add_spatial_coordinates": True,
        "interleave": True,
        "interleave_sparsity": 2,
        "twoD_vision_embedding": True,
    },
}


def checkpoint(folder: Path, projector_type: str = "mlp2x_gelu", **flags) -> Path:
    """A HF checkpoint with these interventions, as stage 2 writes it."""
    model, tokenizer, processor = build_model(
        LLM,
        TOWER,
        Interventions(**flags),
        projector_type=projector_type,
        image_aspect_ratio="pad",
        prompt_version="v1",
    )
    save_checkpoint(model, tokenizer, processor, folder, prompt_version="v1", image_aspect_ratio="pad")
    return folder


def run(*words, expect: int = 0) -> None:
    try:
        convert.main([str(word) for word in words])
        status = 0
    except SystemExit as stop:
        status = stop.code
    assert status == expect


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return tensors.read_folder(folder)


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    "name",
    [name if name in ("vanilla", "all") else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS],
)
def test_round_trip(name, tmp_path):
    """HF -> original -> HF: the same tensors and the same interventions."""
    hf = checkpoint(tmp_path / "hf", **VARIANTS[name])
    run(hf, tmp_path / "original", "--to", "llava", "--vision_tower", TOWER)
    run(tmp_path / "original", tmp_path / "back", "--to", "hf")
    assert_equal(all_tensors(hf), all_tensors(tmp_path / "back"))
    first, second = (load_model(folder)[0].config for folder in (hf, tmp_path / "back"))
    assert first.interventions == second.interventions
    assert (first.image_aspect_ratio, first.vision_feature_layer) == (
        second.image_aspect_ratio,
        second.vision_feature_layer,
    )


@pytest.mark.parametrize("projector_type", ["linear", "mlp3x_gelu"])
def test_round_trip_of_other_projectors(projector_type, tmp_path):
    hf = checkpoint(tmp_path / "hf", projector_type, normalize_projector=True)
    run(hf, tmp_path / "original", "--to", "llava", "--vision_tower", TOWER)
    run(tmp_path / "original", tmp_path / "back", "--to", "hf")
    assert_equal(all_tensors(hf), all_tensors(tmp_path / "back"))


def test_original_round_trip(tmp_path):
    """Original -> HF -> original: the same tensors and, for LLaVA's own fields, the same config."""
    run(checkpoint(tmp_path / "hf"), tmp_path / "one", "--to", "llava", "--vision_tower", TOWER)
    run(tmp_path / "one", tmp_path / "two", "--to", "hf")
    run(tmp_path / "two", tmp_path / "three", "--to", "llava", "--vision_tower", TOWER)
    assert_equal(all_tensors(tmp_path / "one"), all_tensors(tmp_path / "three"))
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "three"))
    assert {key for key in first if first[key] != second.get(key)} <= {"_name_or_path", original.OWN_KEY}


def test_the_sentencepiece_model_comes_along(tmp_path):
    """LLaVA's loader asks for the slow tokenizer, which reads this file alone."""
    run(stage_1(tmp_path / "stage1"), tmp_path / "hf", "--to", "hf", "--llm", LLM, "--tower", TOWER)
    run(tmp_path / "hf", tmp_path / "original", "--to", "llava", "--vision_tower", TOWER)
    for name in ("hf", "original"):
        folder = tmp_path / name
        assert (folder / "tokenizer.model").read_bytes() == (LLM / "tokenizer.model").read_bytes()
        assert json.loads((folder / "tokenizer_config.json").read_text())["legacy"] is False
        text = "USER: What is it? ASSISTANT: A circle.</s>USER: Why?"
        assert load_tokenizer(folder)(text)["input_ids"] == load_tokenizer(LLM)(text)["input_ids"]


def test_exported_config_speaks_the_published_names(tmp_path):
    hf = checkpoint(
        tmp_path / "hf", compression_after_projection=True, final_spatial_size=4, normalize_projector=True
    )
    run(hf, tmp_path / "original", "--to", "llava", "--vision_tower", TOWER)
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    assert config["final_spatial_size"] == 2, "the published code takes the side"
    assert (
        config["compression_after_projection"]
        and config["normalize_projector"]
        and config["num_vision_tokens"] == 16
    )
    assert config["model_type"] == "llava_llama" and config["mm_vision_tower"] == str(TOWER)
    assert config["spatial_llava"]["loads_with"] == ["the published intervention code", "llava_ext"]
    assert "model.mm_projector.proj.projector.0.weight" in all_tensors(tmp_path / "original")


def test_what_the_published_code_can_not_load_says_so(tmp_path):
    hf = checkpoint(tmp_path / "hf", use_multilayer_features=True, multilayer_layers=(1, 2))
    run(hf, tmp_path / "original", "--to", "llava", "--vision_tower", TOWER)
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    assert config["spatial_llava"]["loads_with"] == ["llava_ext"]


PUBLISHED = [
    (
        {"compression_after_projection": True, "final_spatial_size": 2},
        {"final_spatial_size": 4, "published_behaviour": False},
    ),
    (
        {"compression_after_projection": True, "final_spatial_size": 3},
        {"final_spatial_size": 3, "published_behaviour": True},
    ),
    ({"compression_after_projection": False, "final_spatial_size": 16}, {"final_spatial_size": None}),
    ({"twoD_vision_embedding": True}, {"published_behaviour": True}),
    ({"interleave": True, "interleave_sparsity": 2}, {"published_behaviour": True, "sparsity": 4}),
    ({"normalize_projector": True, "use_multilayer_features": True}, {"multilayer_layers": (12, 16, 20, 24)}),
]


@pytest.mark.parametrize(("fields", "meaning"), PUBLISHED)
def test_published_configs_are_understood(fields, meaning):
    """`config.json` as the published code writes it: what its fields mean there."""
    found = original.interventions_from_original({"add_registers": False, **fields}, grid_side=4)
    found.validate(4, 24)
    assert {key: getattr(found, key) for key in meaning} == meaning


def test_published_interleave_on_its_own_grid_needs_no_switch():
    found = original.interventions_from_original({"interleave": True}, grid_side=24)
    assert found == Interventions(interleave=True, interleave_sparsity=4)


def stage_1(folder: Path, name: str = "vanilla") -> Path:
    """A recorded stage-1 folder of the original code."""
    folder.mkdir()
    shutil.copy(GOLDEN / "train" / f"{name}_stage1_mm_projector.bin", folder / "mm_projector.bin")
    shutil.copy(GOLDEN / "artefacts" / f"{name}_stage1_config.json", folder / "config.json")
    return folder


@pytest.mark.parametrize("name", ["vanilla", "normalize_multilayer"])
def test_a_stage_1_folder_on_its_base_llm(name, tmp_path):
    folder = stage_1(tmp_path / "stage1", name)
    run(folder, tmp_path / "hf", "--to", "hf", "--llm", LLM, "--tower", TOWER)
    run(tmp_path / "hf", tmp_path / "again", "--to", "llava", "--projector_only", "--vision_tower", TOWER)
    assert_equal(
        tensors.read_tensors(folder / "mm_projector.bin"),
        tensors.read_tensors(tmp_path / "again" / "mm_projector.bin"),
    )
    assert not (tmp_path / "again" / "model.safetensors").exists()


def lora(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder as LLaVA's LoRA training of peft 0.4 leaves it: pickles, suffixes of names, settings that
    have gone.
    """
    stage_1(folder)
    projector = tensors.read_tensors(folder / "mm_projector.bin")
    (folder / "mm_projector.bin").unlink()
    torch.save({f"base_model.model.{name}": t for name, t in projector.items()}, folder / tensors.NON_LORA)
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, tensor in all_tensors(LLM).items():
        if name.endswith("_proj.weight"):
            rows, columns = tensor.shape
            layer = "base_model.model." + name.removesuffix(".weight")
            weights[f"{layer}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
            weights[f"{layer}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    torch.save(weights, folder / "adapter_model.bin")
    settings = {
        "auto_mapping": None,
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.5",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 4,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 2,
        "revision": None,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder, weights


def test_a_lora_folder_of_llavas_becomes_a_checkpoint(tmp_path):
    folder, added = lora(tmp_path / "lora")
    run(folder, tmp_path / "hf", "--to", "hf", "--llm", LLM, "--tower", TOWER)
    run(tmp_path / "hf", tmp_path / "original", "--to", "llava", "--vision_tower", TOWER)
    found, base = all_tensors(tmp_path / "original"), all_tensors(LLM)
    name = "model.layers.0.self_attn.q_proj"
    up, down = (added[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
    torch.testing.assert_close(found[f"{name}.weight"], base[f"{name}.weight"] + 2 * up @ down)
    assert torch.equal(found["model.norm.weight"], base["model.norm.weight"])
    stored = tensors.read_tensors(folder / tensors.NON_LORA)
    assert all(torch.equal(found[key.removeprefix("base_model.model.")], t) for key, t in stored.items())


def test_a_lora_folder_that_does_not_fit_is_refused(tmp_path, capsys):
    folder, added = lora(tmp_path / "lora")
    words = (folder, tmp_path / "hf", "--to", "hf", "--llm", LLM, "--tower", TOWER)
    projector = tensors.read_tensors(folder / tensors.NON_LORA)
    torch.save(
        projector | {"base_model.model.model.embed_tokens.weight": torch.ones(1)}, folder / tensors.NON_LORA
    )
    run(*words, expect=1)
    assert "allowed is a projector; found base_model.model.model.embed_tokens" in capsys.readouterr().err
    torch.save(projector, folder / tensors.NON_LORA)
    for wrong in (
        {name: t[:, :1] for name, t in added.items()},
        {"base_model.model.model.x.lora_A.weight": 0 * next(iter(added.values()))},
    ):
        torch.save(wrong, folder / "adapter_model.bin")
        run(*words, expect=1)
        assert "its adapters do not fit" in capsys.readouterr().err
    (folder / "adapter_model.bin").unlink()
    run(*words, expect=1)
    assert "no adapters; expected adapter_config.json" in capsys.readouterr().err


def test_sharded_and_pickled_originals(tmp_path):
    """`pytorch_model-*.bin` with an index, as older LLaVA checkpoints are."""
    run(checkpoint(tmp_path / "hf"), tmp_path / "original", "--to", "llava", "--vision_tower", TOWER)
    state = all_tensors(tmp_path / "original")
    names, old = sorted(state), tmp_path / "old"
    shutil.copytree(tmp_path / "original", old)
    (old / "model.safetensors").unlink()
    halves = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, members in halves.items():
        torch.save({name: state[name] for name in members}, old / file)
    places = {name: file for file, members in halves.items() for name in members}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    run(old, tmp_path / "back", "--to", "hf")
    assert_equal(all_tensors(tmp_path / "hf"), all_tensors(tmp_path / "back"))


def test_other_interventions_than_expected_are_refused(tmp_path, capsys):
    hf = checkpoint(tmp_path / "hf", normalize_projector=True)
    run(hf, tmp_path / "no", "--to", "llava", "--vision_tower", TOWER, "--use_multilayer_features", expect=1)
    text = capsys.readouterr().err
    assert (
        "normalize_projector: False against True" in text
        and "use_multilayer_features: True against False" in text
    )
    assert not (tmp_path / "no").exists()
    run(hf, tmp_path / "yes", "--to", "llava", "--vision_tower", TOWER, "--normalize_projector")


def test_flags_are_written_as_in_a_training():
    words = "a b --to hf --use_multilayer_features True --multilayer_layers 3,9 12 --normalize_projector"
    words += " --projector_max_norm None --normalize_statistics auto"
    found = take_interventions(convert.make_parser().parse_args(words.split()))
    assert found == Interventions(
        use_multilayer_features=True,
        multilayer_layers=(3, 9, 12),
        normalize_projector=True,
        normalize_statistics="auto",
    )
    assert take_interventions(convert.make_parser().parse_args(["a", "b", "--to", "hf"])) is None


def test_mistakes_are_named(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    hf = checkpoint(tmp_path / "hf")
    cases = [
        ((tmp_path / "nowhere", tmp_path / "out", "--to", "hf"), "no config.json"),
        ((hf, tmp_path / "full", "--to", "llava", "--vision_tower", TOWER), "not empty"),
        ((stage_1(tmp_path / "one"), tmp_path / "out", "--to", "hf", "--llm", LLM), "--tower"),
        ((tmp_path / "one", tmp_path / "out", "--to", "hf", "--tower", TOWER), "--llm"),
    ]
    for words, message in cases:
        run(*words, expect=1)
        assert message in capsys.readouterr().err
    assert (tmp_path / "full" / "file").read_text() == "mine"


class Harmful:
    """A pickle that would run code when loaded carelessly."""

    def __reduce__(self):
        return (Path.touch, (Path("harm_was_done"),))


def test_a_harmful_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mm_projector.bin"
    path.write_bytes(pickle.dumps({"model.mm_projector.0.weight": Harmful()}))
    with pytest.raises(TrainingError, match="not only tensors"):
        tensors.read_projector(path)
    torch.save({"model.mm_projector.0.weight": Harmful()}, path)
    with pytest.raises(TrainingError, match="not only tensors"):
        tensors.read_projector(path)
    assert not (tmp_path / "harm_was_done").exists()


def test_damaged_weights_are_named(tmp_path):
    save_file({"model.mm_projector.0.weight": torch.zeros(2, 2)}, tmp_path / "mm_projector.safetensors")
    whole = (tmp_path / "mm_projector.safetensors").read_bytes()
    (tmp_path / "mm_projector.safetensors").write_bytes(whole[:-3])
    with pytest.raises(TrainingError, match=r"mm_projector.safetensors: damaged"):
        tensors.read_projector(tmp_path)


def test_projector_keys_of_every_recorded_configuration():
    """Names that the published code gives the projector, for each combination of its wrappers."""
    listed: dict[str, set[str]] = {}
    for line in (GOLDEN / "artefacts" / "projector_keys_all_configs.txt").read_text().splitlines():
        if line.endswith(".safetensors"):
            found = listed.setdefault(line, set())
        elif line.startswith("    model."):
            found.add(line.split()[0])
    words = {
        "normalize": "normalize_projector",
        "spatial": "add_spatial_coordinates",
        "compress": "compression_after_projection",
    }
    tried = 0
    for name, names in listed.items():
        parts = name.removesuffix(".safetensors").split("_")
        # Registers do nothing; coordinates with compression never worked there.
        if "registers" in parts or {"spatial", "compress"} <= set(parts):
            continue
        flags = {flag: True for word, flag in words.items() if word in parts}
        ours = keys.projector_from_original({key: torch.zeros(1) for key in names})
        assert set(keys.projector_to_original(ours, Interventions(**flags))) == names, name
        tried += 1
    assert tried > 20
