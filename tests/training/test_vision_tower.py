"""`train_vision_tower`: what of the tower trains and how, on the command line and through both stages."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from llava_ext.checkpoints import original
from llava_ext.checkpoints.stored import load_model
from llava_ext.convert import convert
from llava_ext.errors import TrainingError
from llava_ext.model.build import build_model
from llava_ext.model.configuration_spatial_llava import SpatialLlavaConfig
from llava_ext.model.parts import load_tower
from llava_ext.training.arguments import LlavaTrainingArguments, make_parser, parse
from llava_ext.training.identity import check_identity
from llava_ext.training.llava_flags import parts_as_switches, split_flags, translate
from llava_ext.training.optimizer import TOWER, component, freeze, parameter_groups
from llava_ext.training.precision import cast_frozen
from llava_ext.training.trainer import LlavaTrainer
from llava_ext.training.vision_tower import train_tower, unreached
from tests.support.disturb import After, Signal
from tests.support.trainings import GOLDEN, command_line, losses, result, rows, run

SHORT = {"max_steps": 3, "gradient_accumulation_steps": 1, "save_strategy": "no", "num_train_epochs": None}
TRAINED = {"train_vision_tower": True, "vision_tower_lr": 1e-4}
LLM, CLIP = GOLDEN / "llm", GOLDEN / "clip_g4"


def tower_of(folder: Path) -> dict[str, torch.Tensor]:
    """The vision tower's weights in a finished HF checkpoint, by their names within the tower."""
    found = load_file(folder / "model.safetensors")
    named = {name.partition("vision_tower.")[2]: value for name, value in found.items()}
    return {name.removeprefix("vision_model."): value for name, value in named.items() if name}


def moved(tower: dict[str, torch.Tensor]) -> set[str]:
    """Names that differ from the tower before all training."""
    before = load_tower(CLIP, torch.float32, None).state_dict()
    assert before.keys() == tower.keys()
    return {name for name, value in before.items() if not torch.equal(value, tower[name])}


def a_model():
    return build_model(LLM, CLIP)[0]


# -- the command line -------------------------------------------------------------------------------------


def switches(text: str) -> dict[str, list[str]]:
    return dict(parts_as_switches(split_flags(text.split())))


@pytest.mark.parametrize(
    ("parts", "on"),
    [
        ("mm_mlp_adapter", {"tune_mm_mlp_adapter"}),
        ("mm_mlp_adapter,mm_language_model", set()),
        ("mm_vision_tower,mm_mlp_adapter,mm_language_model", {"train_vision_tower"}),
        ("mm_vision_tower,mm_mlp_adapter", {"train_vision_tower", "tune_mm_mlp_adapter"}),
        ("mm_language_model", {"freeze_mm_mlp_adapter"}),
        ("mm_vision_tower", {"train_vision_tower", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter"}),
    ],
)
def test_tunable_parts_of_llava_next_say_all_that_trains(parts, on):
    assert switches(f"--bf16 True --mm_tunable_parts={parts}") == {
        "bf16": ["True"],
        **{name: ["True"] for name in on},
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--mm_tunable_parts mm_vision_resampler",
            ["mm_vision_resampler", "mm_mlp_adapter, mm_language_mod"],
        ),
        ("--mm_tunable_parts=", ["no part", "mm_vision_tower"]),
        ("--mm_tunable_parts mm_language_model --tune_mm_mlp_adapter True", ["--tune_mm_mlp_adapter True"]),
        ("--mm_tunable_parts mm_mlp_adapter --unfreeze_mm_vision_tower True", ["contradicts"]),
        ("--mm_tunable_parts mm_vision_tower --train_vision_tower False", ["--train_vision_tower False"]),
        ("--mm_tunable_parts mm_language_model --freeze_backbone True", ["--freeze_backbone True"]),
        ("--vision_tower_lr 1e-5", ["--vision_tower_lr 1e-05", "--train_vision_tower True"]),
        ("--train_vision_tower True --mm_vision_tower_lr 0", ["--vision_tower_lr 0.0", "above 0"]),
        ("--mm_tunable_part mm_vision_tower", ["did you mean --mm_tunable_parts?"]),
    ],
)
def test_mistakes_are_named(flags, words, tmp_path):
    needed = ["--model_name_or_path", str(LLM), "--data_path", str(GOLDEN / "train/stage1.json")]
    with pytest.raises(TrainingError) as error:
        parse([*needed, "--output_dir", str(tmp_path), *flags.split()])
    for word in words:
        assert word in str(error.value)


def test_names_of_llava_next_are_translated():
    known = [option[2:] for action in make_parser()._actions for option in action.option_strings]
    argv, _ = translate(
        ["--unfreeze_mm_vision_tower", "True", "--mm_vision_tower_lr=2e-6"], known, tf32_works=False
    )
    assert argv == ["--train_vision_tower", "True", "--vision_tower_lr", "2e-6"]


def test_a_training_from_before_the_flag_existed_goes_on(tmp_path):
    check_identity(tmp_path, {"seed": 1})
    (tmp_path / "train_result.json").write_text('{"status": "interrupted"}')
    now = {"seed": 1, "train_vision_tower": False, "vision_tower_lr": None}
    check_identity(tmp_path, now)
    with pytest.raises(TrainingError, match="train_vision_tower: False when it was started, now True"):
        check_identity(tmp_path, now | {"train_vision_tower": True})


# -- what trains ------------------------------------------------------------------------------------------


def test_what_the_vision_tokens_do_not_use_can_not_train():
    """Of 24 layers; the closing norm is used by several layers only."""

    config = a_model().config

    def idle(**changes: object) -> set[str]:
        names = unreached(SpatialLlavaConfig(**(config.to_dict() | changes)))
        return {".".join(name.split(".")[:3]) if "layers" in name else name.split(".")[0] for name in names}

    assert idle(vision_feature_layer=-1) == {"post_layernorm"}
    assert idle(vision_feature_layer=-2) == {"post_layernorm", "encoder.layers.23"}
    assert idle(vision_feature_layer=22) == {"post_layernorm", "encoder.layers.22", "encoder.layers.23"}
    several = {"use_multilayer_features": True, "multilayer_layers": (3, 21)}
    assert idle(**several) == {f"encoder.layers.{number}" for number in (21, 22, 23)}


def test_exactly_what_trains_gets_gradients_and_text_alone_gives_zeros(capsys):
    model = a_model()
    freeze(model, tune_mm_mlp_adapter=True, freeze_mm_mlp_adapter=True, freeze_backbone=False)
    train_tower(model)
    assert (
        "the vision tower trains, except encoder.layers.23, post_layernorm, which" in capsys.readouterr().err
    )
    tower = model.model.vision_tower
    ids = torch.tensor([[1, 5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(
        component(name) == TOWER for name, p in model.named_parameters() if p.requires_grad
    )
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)
    tower.zero_grad()
    ids = torch.tensor([[1, *[model.config.image_token_id] * 16, 7, 8]])
    labels = ids.masked_fill(ids == model.config.image_token_id, -100)
    model(input_ids=ids, labels=labels, pixel_values=torch.randn(1, 3, 56, 56)).loss.backward()
    assert all(parameter.grad is not None for parameter in trained)
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def test_groups_have_the_towers_own_rate_and_no_decay_of_norms_and_biases():
    model = a_model()
    freeze(model, tune_mm_mlp_adapter=False, freeze_mm_mlp_adapter=False, freeze_backbone=False)
    train_tower(model)
    groups = parameter_groups(model, 0.1, mm_projector_lr=1e-3, vision_tower_lr=2e-6)
    assert [(group.get("lr"), group["weight_decay"]) for group in groups] == [
        (None, 0.1),
        (None, 0.0),
        (1e-3, 0.1),
        (1e-3, 0.0),
        (2e-6, 0.1),
        (2e-6, 0.0),
    ]
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    decayed, undecayed = groups[4]["names"], groups[5]["names"]
    assert all(component(name) == TOWER for name in [*decayed, *undecayed])
    assert all(name.endswith(".bias") or "norm" in name for name in undecayed)
    assert not any(name.endswith(".bias") or "norm" in name for name in decayed)
    shared = parameter_groups(model, 0.1)
    assert len(shared) == 2 and set(decayed) < set(shared[0]["names"])


def test_a_tower_that_trains_stays_in_float32(tmp_path):
    model = a_model()
    freeze(model, tune_mm_mlp_adapter=True, freeze_mm_mlp_adapter=False, freeze_backbone=False)
    train_tower(model)
    cast_frozen(model, LlavaTrainingArguments(output_dir=str(tmp_path), bf16=True, use_cpu=True))
    assert {p.dtype for p in model.model.vision_tower.parameters()} == {torch.float32}
    assert {p.dtype for p in model.model.language_model.parameters()} == {torch.bfloat16}


# -- both stages through the command line -----------------------------------------------------------------


def trained(outcome: tuple[int, str]) -> str:
    status, text = outcome
    assert status == 0, text[-3000:]
    return text


@pytest.fixture
def stage_1(tmp_path, train_here) -> Path:
    """The output of a stage 1 in which projector and tower trained."""
    flags = {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter", "mm_vision_tower_lr": 1e-4}
    argv = command_line(1, tmp_path / "one", **SHORT | flags | {"tune_mm_mlp_adapter": None})
    assert "the vision tower trains, except encoder.layers.23" in trained(train_here(argv))
    return tmp_path / "one"


def test_stage_1_leaves_the_tower_beside_the_projector_and_stage_2_takes_it(stage_1, tmp_path, train_here):
    beside = stage_1 / "vision_tower"
    assert "vision_tower/model.safetensors" in result(stage_1)["files"]
    assert (beside / "preprocessor_config.json").is_file()
    assert load_file(beside / "model.safetensors").keys() == load_file(CLIP / "model.safetensors").keys(), (
        "in the names of its files, which other programs read"
    )
    tower = load_tower(beside, torch.float32, None)
    idle = unreached(load_model(stage_1, llm=LLM)[0].config)
    names = moved(tower.state_dict())
    assert names and not names & idle

    flags = {"vision_tower": beside, "pretrain_mm_mlp_adapter": stage_1}
    trained(train_here(command_line(2, tmp_path / "two", **SHORT | flags)))
    two = tower_of(tmp_path / "two")
    assert all(torch.equal(value, two[name]) for name, value in tower.state_dict().items()), "frozen again"
    stock, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "two", output_loading_info=True)
    assert not any(info.values())
    loaded = stock.model.vision_tower.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in tower.state_dict().items())


def test_a_projector_is_not_joined_with_another_tower_than_it_was_trained_with(stage_1, tmp_path, train_here):
    status, text = train_here(
        command_line(2, tmp_path / "two", **SHORT | {"pretrain_mm_mlp_adapter": stage_1})
    )
    assert status == 1 and f"give {stage_1}/vision_tower as the vision tower" in text
    with pytest.raises(TrainingError, match="was trained together with its vision tower"):
        load_model(stage_1, llm=LLM, tower=CLIP)


def test_the_original_layout_keeps_a_trained_tower_both_ways(tmp_path, train_here):
    """LLaVA reads the tower inside a checkpoint when `unfreeze_mm_vision_tower` stands in its config, and
    so do we.
    """
    trained(train_here(command_line(2, tmp_path / "two", **SHORT | TRAINED)))
    tower = tower_of(tmp_path / "two")
    assert moved(tower)
    convert(tmp_path / "two", tmp_path / "original", "llava", vision_tower=str(CLIP))
    assert json.loads((tmp_path / "original/config.json").read_text())["unfreeze_mm_vision_tower"] is True
    convert(tmp_path / "original", tmp_path / "back", "hf")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "back"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(TrainingError, match="--projector_only: the vision tower of this model was trained"):
        convert(tmp_path / "two", tmp_path / "p", "llava", vision_tower=str(CLIP), projector_only=True)


def test_an_original_that_lacks_its_trained_tower_is_refused(tmp_path):
    from safetensors.torch import save_file

    model, tokenizer, _ = build_model(LLM, CLIP)
    original.export_original(model, tokenizer, tmp_path / "o", {"mm_vision_tower": str(CLIP)})
    described = json.loads((tmp_path / "o/config.json").read_text())
    assert "unfreeze_mm_vision_tower" not in described
    # as LLaVA-NeXT says it
    described["mm_tunable_parts"] = "mm_vision_tower,mm_mlp_adapter,mm_language_model"
    (tmp_path / "o/config.json").write_text(json.dumps(described))
    assert load_model(tmp_path / "o")[0].config.vision_config.unfreeze_mm_vision_tower
    weights = load_file(tmp_path / "o/model.safetensors")
    kept = {name: value for name, value in weights.items() if "post_layernorm" not in name}
    save_file(kept, tmp_path / "o/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"do not fit .*post_layernorm"):
        load_model(tmp_path / "o")


@pytest.mark.slow
def test_checkpointing_and_half_precision_compute_the_same(tmp_path, train_here):
    trained(train_here(command_line(2, tmp_path / "plain", **SHORT | TRAINED)))
    trained(train_here(command_line(2, tmp_path / "less", **SHORT | TRAINED, gradient_checkpointing=True)))
    assert losses(tmp_path / "plain") == losses(tmp_path / "less")
    assert moved(tower_of(tmp_path / "plain"))
    half = SHORT | TRAINED | {"bf16": True, "gradient_checkpointing": True}
    trained(train_here(command_line(2, tmp_path / "half", **half)))
    for ours, theirs in zip(losses(tmp_path / "half"), losses(tmp_path / "plain"), strict=True):
        assert ours[1] == pytest.approx(theirs[1], abs=0.05)


@pytest.mark.slow
def test_adapters_of_the_llm_beside_a_tower_that_trains_whole(tmp_path, train_here):
    flags = SHORT | TRAINED | {"lora_enable": True, "lora_r": 4, "lora_alpha": 8}
    trained(train_here(command_line(2, tmp_path, **flags)))
    assert moved(tower_of(tmp_path))
    stock, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and stock.config.vision_config.unfreeze_mm_vision_tower


# -- interruptions ----------------------------------------------------------------------------------------

FINAL = {1: ("mm_projector.safetensors", "vision_tower/model.safetensors"), 2: ("model.safetensors",)}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "number"), [(1, signal.SIGKILL), (2, signal.SIGUSR1)])
def test_an_interrupted_training_ends_with_the_same_bits(stage, number, tmp_path):
    flags = TRAINED | {"num_train_epochs": 1}
    run(command_line(stage, tmp_path / "whole", **flags), tmp_path / "log")
    argv = command_line(stage, tmp_path / "out", **flags)
    in_step_7 = After(LlavaTrainer.compute_loss, Signal(number), calls=13)
    run(argv, tmp_path / "log", expect=-number if number == signal.SIGKILL else 0, before=in_step_7)
    assert 6 <= len(rows(tmp_path / "out")) <= 7
    assert not any((tmp_path / "out" / name).exists() for name in FINAL[stage])
    assert "continuing from" in run(argv, tmp_path / "log")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    for name in FINAL[stage]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Flags of a training in which one of two processes gets a batch of texts while the other has pictures,
    both parts with rates of their own; and what one process makes of them.
    """
    folder = tmp_path_factory.mktemp("alone")
    records = json.loads((GOLDEN / "train" / "stage2.json").read_text())
    pictures = [record for record in records if "image" in record]
    texts = [record for record in records if "image" not in record]
    (folder / "samples.json").write_text(json.dumps(pictures[:4] + texts[:4] + pictures[4:28]))
    flags = TRAINED | {
        "data_path": folder / "samples.json",
        "max_steps": 4,
        "save_steps": 2,
        "group_by_modality_length": None,
        "sampling": "sequential",
        "weight_decay": 0.3,
        "mm_projector_lr": 5e-4,
    }
    run(command_line(2, folder / "one", **flags), folder / "log")
    return flags, folder / "one"


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [{"deepspeed": "zero2.json"}, {"deepspeed": "zero3.json"}, {"fsdp": True}, {}],
    ids=["zero2", "zero3", "fsdp", "ddp"],
)
def test_two_processes_equal_one_and_one_continues(engine, alone, tmp_path):
    flags, one = alone
    several = flags | {"gradient_accumulation_steps": 1} | engine
    run(command_line(2, tmp_path / "two", **several), tmp_path / "log", processes=2)
    assert_close(tmp_path / "two", one)
    if "fsdp" in engine:  # never on a single process
        return
    for name in ("train_result.json", "model.safetensors"):
        (tmp_path / "two" / name).unlink()
    shutil.rmtree(tmp_path / "two/checkpoint-4")
    text = run(command_line(2, tmp_path / "two", **flags | engine), tmp_path / "log")
    assert "saved by 2 processes, now 1" in text
    assert_close(tmp_path / "two", one)


def assert_close(ours: Path, theirs: Path) -> None:
    for mine, other in zip(losses(ours), losses(theirs), strict=True):
        assert mine[1] == pytest.approx(other[1], abs=5e-6) and mine[3] == pytest.approx(other[3], rel=1e-4)
    first, second = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert moved(tower_of(ours)) == moved(tower_of(theirs)) != set()
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-4
