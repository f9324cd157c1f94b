"""The recorded trainings, through the real command line: losses, rates, gradient norms and final weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_ext import convert
from llava_ext.checkpoints import keys, tensors
from llava_ext.checkpoints.stored import load_model
from llava_ext.model.build import build_model
from llava_ext.training.arguments import parse
from llava_ext.training.optimizer import freeze, parameter_groups

from . import reference

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
LOSS, NORM, WEIGHT = 1e-4, 2e-4, 1e-5
# Adam moves a weight whose gradient is all rounding error by up to a step, so single weights may differ more
# than the rest.
SINGLE_WEIGHT = 1e-3


def names(root: Path) -> list[str]:
    """Recorded trainings: those whose JSON has a command line."""
    return sorted(path.stem for path in (root / "train").glob("*.json") if "argv" in reference.read(path))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "training" in metafunc.fixturenames:
        metafunc.parametrize("training", names(reference.folder(metafunc.config)))


def command_line(root: Path, name: str, output_dir: Path, **changes: object) -> list[str]:
    """The recorded flags as they stand, with another output folder and changes; the recording saw the samples
    in the file's order.
    """
    flags = dict(reference.read(root / "train" / f"{name}.json")["argv"])
    flags["output_dir"] = output_dir
    adapter = Path(flags["pretrain_mm_mlp_adapter"])
    if not (root / adapter).is_file():  # the output of a stage-1 run, which is kept under that run's name
        flags["pretrain_mm_mlp_adapter"] = f"train/{adapter.parent.name}_mm_projector.bin"
    variant_flags = {"normalize_projector": "normalize", "use_multilayer_features": "multilayer"}
    flags |= {
        flag: True for flag, word in variant_flags.items() if flag not in flags and word in name.split("_")
    }
    flags |= changes
    return [text for flag, value in flags.items() for text in (f"--{flag}", str(value))] + [
        "--sampling",
        "sequential",
    ]


# What the configurations for GPUs choose, as far as it is cheap here; it only rounds otherwise.
FAST = {"attention": "varlen", "pack": True, "checkpoint_layers": 2, "optim": "adamw_torch_fused"}


@pytest.fixture(scope="module")
def outputs(root, tmp_path_factory):
    """Every recorded training, done again."""
    return train(root, tmp_path_factory.mktemp("trainings"), names(root))


def train(root: Path, folder: Path, trainings: list[str], **changes: object) -> Path:
    """Recorded trainings with other flags, one after the other in one process."""
    lines = [command_line(root, name, folder / name, **changes) for name in trainings]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("train_many.py"))],
        input=json.dumps(lines),
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_state(root: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The final weights under the original layout's names."""
    if (folder / "mm_projector.bin").is_file():
        return tensors.read_tensors(folder / "mm_projector.bin")
    model, _, _ = load_model(folder)
    return keys.state_to_original(model.state_dict(), model.config.interventions)


def test_trajectory(root, outputs, training, report_difference):
    recorded = reference.arrays(root / "train" / f"{training}.npz")
    rows = metrics(outputs / training)
    report_difference(
        f"train/{training} loss", reference.largest([row["loss"] for row in rows], recorded["loss"]), LOSS
    )
    report_difference(
        f"train/{training} lr", reference.largest([row["lr"] for row in rows], recorded["lr"]), 1e-12
    )
    before = recorded["grad_norm_before_clip"]
    norms = before if len(before) else recorded["grad_norm_at_step"]
    difference = reference.largest([row["grad_norm"] for row in rows], norms)
    report_difference(f"train/{training} grad norm", difference, NORM * max(1.0, norms.max()))


def test_trajectory_with_kernels_for_gpus(root, tmp_path, report_difference):
    """Stage 2, where all of them have something to do: packed rows, segments, half of the layers recomputed,
    the fused Adam.
    """
    stage_2 = [name for name in names(root) if name.endswith("stage2")]
    train(root, tmp_path, stage_2, **FAST)
    for training in stage_2:
        recorded = reference.arrays(root / "train" / f"{training}.npz")
        rows = metrics(tmp_path / training)
        difference = reference.largest([row["loss"] for row in rows], recorded["loss"])
        report_difference(f"train/{training} loss, with kernels for GPUs", difference, 1e-5)


def test_final_weights(root, outputs, training, report_difference):
    recorded = reference.arrays(root / "train" / f"{training}.npz")
    state = final_state(root, outputs / training)
    for name, theirs in recorded.items():
        key = name.removeprefix("final/")
        if name.startswith("final/") and key in state:
            ours = state[key].numpy()
            report_difference(
                f"train/{training} weights, largest", reference.largest(ours, theirs), SINGLE_WEIGHT
            )
            report_difference(f"train/{training} weights, mean", float(abs(ours - theirs).mean()), WEIGHT)
    norms = dict(
        zip(recorded["final_param_names"].tolist(), recorded["final_param_l2"].tolist(), strict=True)
    )
    trained = {key: value for key, value in state.items() if key in norms}
    assert any("mm_projector" in key for key in trained)
    for key, value in trained.items():
        ours = value.double().norm().item()
        report_difference(
            f"train/{training} parameter norms", abs(ours - norms[key]), LOSS * max(1.0, norms[key])
        )
    # Nothing is lost on the way: stage 2 writes every recorded parameter, and the vocabulary has its own size
    # again.
    if not (outputs / training / "mm_projector.bin").is_file():
        assert set(norms) <= set(state)


def test_optimizer_groups(root, tmp_path, training, monkeypatch):
    monkeypatch.chdir(root)
    arguments = parse(command_line(root, training, tmp_path))
    model, _, _ = build_model(
        arguments.model.model_name_or_path,
        arguments.model.vision_tower,
        arguments.interventions,
        projector_type=arguments.model.mm_projector_type,
    )
    freeze(
        model,
        tune_mm_mlp_adapter=arguments.model.tune_mm_mlp_adapter,
        freeze_mm_mlp_adapter=arguments.training.freeze_mm_mlp_adapter,
        freeze_backbone=arguments.model.freeze_backbone,
    )
    ours = [
        {
            "n_params": len(group["params"]),
            "n_elements": sum(parameter.numel() for parameter in group["params"]),
            "weight_decay": group["weight_decay"],
        }
        for group in parameter_groups(model, arguments.training.weight_decay)
    ]
    assert ours == reference.read(root / "train" / f"{training}.json")["optimizer"]["groups"]


# Fields that say where and with what a checkpoint was made, and a constant of the published code that is
# counted here.
FREE_FIELDS = {
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "num_vision_tokens",
    "rope_theta",
    "architectures",
}


def assert_config_as_recorded(folder: Path, recorded: Path) -> None:
    ours, theirs = reference.read(folder / "config.json"), reference.read(recorded)
    wrong = {
        key: (ours.get(key, "absent"), value)
        for key, value in theirs.items()
        if key not in FREE_FIELDS and ours.get(key) != value
    }
    assert not wrong


def test_stage_1_config(root, outputs):
    for name in names(root):
        recorded = root / "artefacts" / f"{name}_config.json"
        if (outputs / name / "mm_projector.bin").is_file() and recorded.is_file():
            assert_config_as_recorded(outputs / name, recorded)


def listed_tensors(path: Path) -> dict[str, list[int]]:
    """Names and shapes of the model file in a recorded listing."""
    found, inside = {}, False
    for line in path.read_text().splitlines():
        if not line.startswith(" "):
            inside = line.startswith("model.safetensors")
        elif inside:
            key, shape, _ = line.split("  ")[-3:]
            found[key.strip()] = json.loads(shape)
    return found


def test_round_trip_through_the_original_layout(root, outputs, tmp_path):
    """HF -> original: the recorded names, shapes and config; original -> HF: every tensor as it was."""
    for name in names(root):
        listing = root / "artefacts" / f"{name}_listing.txt"
        if not (outputs / name / "model.safetensors").is_file() or not listing.is_file():
            continue
        tower = root / reference.read(root / "train" / f"{name}.json")["argv"]["vision_tower"]
        original, back = tmp_path / name, tmp_path / f"{name}_back"
        convert.main([str(outputs / name), str(original), "--to", "llava", "--vision_tower", str(tower)])
        written = {key: list(tensor.shape) for key, tensor in tensors.read_folder(original).items()}
        assert written == listed_tensors(listing)
        assert_config_as_recorded_but_tower(original, root / "artefacts" / f"{name}_config.json")
        convert.main([str(original), str(back), "--to", "hf"])
        first, second = tensors.read_folder(outputs / name), tensors.read_folder(back)
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
        assert without_origin(reference.read(outputs / name / "config.json")) == without_origin(
            reference.read(back / "config.json")
        )


def without_origin(config: dict) -> dict:
    """A config without the names of the folders that its parts came from."""
    return {
        key: without_origin(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("_name_or_path", "architectures", "dtype")
    }


def assert_config_as_recorded_but_tower(folder: Path, recorded: Path) -> None:
    content = reference.read(folder / "config.json")
    content["mm_vision_tower"] = Path(content["mm_vision_tower"]).name
    (folder / "config_with_relative_tower.json").write_text(json.dumps(content))
    (folder / "relative").mkdir()
    (folder / "config_with_relative_tower.json").rename(folder / "relative" / "config.json")
    assert_config_as_recorded(folder / "relative", recorded)


def test_stage_1_writes_the_recorded_keys(root, outputs):
    listed = (root / "artefacts" / "projector_keys_all_configs.txt").read_text()
    for name in names(root):
        path = outputs / name / "mm_projector.bin"
        if path.is_file():
            for key, tensor in tensors.read_tensors(path).items():
                assert f"{key}  {list(tensor.shape)}" in listed
