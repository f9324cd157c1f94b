"""The command line: LLaVA's own scripts run as they stand; mistakes are named."""

import dataclasses
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers import TrainingArguments
from transformers.utils import is_flash_attn_2_available

from llava_ext.errors import TrainingError
from llava_ext.model.interventions import InterventionError
from llava_ext.training import console, identity
from llava_ext.training.arguments import (
    DataArguments,
    LlavaTrainingArguments,
    ModelArguments,
    make_parser,
    parse,
)
from llava_ext.training.llava_flags import split_flags, translate
from tests.support.trainings import REPOSITORY, environment

KINDS = (ModelArguments, DataArguments, LlavaTrainingArguments)

# The flags of LLaVA-1.5's pretrain and finetune scripts, and of the published interventions' scripts.
PRETRAIN = [
    "--deepspeed",
    "./scripts/zero2.json",
    "--version",
    "plain",
    "--mm_projector_type",
    "mlp2x_gelu",
    "--tune_mm_mlp_adapter",
    "True",
    "--mm_vision_select_layer",
    "-2",
    "--mm_use_im_start_end",
    "False",
    "--mm_use_im_patch_token",
    "False",
    "--bf16",
    "True",
    "--num_train_epochs",
    "1",
    "--per_device_train_batch_size",
    "32",
    "--per_device_eval_batch_size",
    "4",
    "--gradient_accumulation_steps",
    "1",
    "--evaluation_strategy",
    "no",
    "--save_strategy",
    "steps",
    "--save_steps",
    "24000",
    "--save_total_limit",
    "1",
    "--learning_rate",
    "1e-3",
    "--weight_decay",
    "0.",
    "--warmup_ratio",
    "0.03",
    "--lr_scheduler_type",
    "cosine",
    "--logging_steps",
    "1",
    "--tf32",
    "True",
    "--model_max_length",
    "2048",
    "--gradient_checkpointing",
    "True",
    "--dataloader_num_workers",
    "4",
    "--lazy_preprocess",
    "True",
    "--report_to",
    "none",
]
FINETUNE = [
    *PRETRAIN[:2],
    *[
        "--version",
        "v1",
        "--image_aspect_ratio",
        "pad",
        "--group_by_modality_length",
        "True",
        "--learning_rate",
        "2e-5",
        "--warmup_ratio",
        "0.03",
    ],
    *["--normalize_projector", "True", "--use_multilayer_features", "True"],
]


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The flags that every run needs, on a machine without a GPU that torch can't use."""
    monkeypatch.setattr("llava_ext.training.machine.DEVICES", tmp_path / "dev")
    (tmp_path / "data.json").write_text("[]")
    return [
        "--model_name_or_path", "llm", "--vision_tower", "tower", "--data_path", str(tmp_path / "data.json"),
        "--image_folder", str(tmp_path), "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip


def without_deepspeed(flags):
    return flags[2:]


def test_llava_pretrain_script(base):
    arguments = parse(base + without_deepspeed(PRETRAIN))
    training = arguments.training
    assert arguments.model.tune_mm_mlp_adapter and arguments.model.mm_vision_select_layer == -2
    assert training.warmup_steps == 0.03 and training.get_warmup_steps(100) == 3
    assert training.activation_checkpointing and training.bf16 and training.use_cpu
    assert training.optim == "adamw_torch" and training.eval_strategy == "no"
    assert not training.logging_nan_inf_filter and not training.remove_unused_columns
    assert arguments.interventions.is_vanilla
    assert any("tf32" in notice for notice in arguments.notices)


def test_published_finetune_script(base):
    arguments = parse(base + without_deepspeed(FINETUNE))
    assert arguments.data.image_aspect_ratio == "pad" and arguments.training.group_by_modality_length
    assert arguments.interventions.active == ("normalize_projector", "use_multilayer_features")


def test_defaults_are_llavas(base):
    arguments = parse(base)
    model, data, training = arguments.model, arguments.data, arguments.training
    assert (model.mm_vision_select_layer, model.mm_projector_type, model.mm_vision_select_feature) == (
        -1,
        "linear",
        "patch",
    )
    assert (data.image_aspect_ratio, training.model_max_length, training.max_grad_norm) == (
        "square",
        512,
        1.0,
    )
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert training.loss_normalization == "micro_batch"


def test_deepspeed_file_of_llava_is_shipped(base):
    known = [option[2:] for action in make_parser()._actions for option in action.option_strings]
    argv, notices = translate(PRETRAIN, known, tf32_works=True)
    config = json.loads(Path(argv[argv.index("--deepspeed") + 1]).read_text())
    assert config["zero_optimization"]["stage"] == 2 and "gradient_clipping" not in config
    assert "zero2.json" in notices[0]
    assert argv[argv.index("--tf32") + 1] == "True"


def test_a_training_that_wants_a_gpu_does_not_fall_back_to_the_cpu(monkeypatch, tmp_path, base):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(TrainingError, match=r"--use_cpu False, but torch .* can use no GPU here"):
        parse(["--use_cpu", "False"])
    assert parse(base).training.use_cpu
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    with pytest.raises(TrainingError, match=r"has .*nvidia0, but torch .*--use_cpu True trains on the CPU"):
        parse(base)
    assert parse([*base, "--use_cpu", "True"]).training.use_cpu
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert parse(base).training.use_cpu


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lerning_rate 1", ["--lerning_rate", "unknown", "--learning_rate"]),
        ("--learn 1", ["--learn", "unknown"]),
        ("--learning_rate fast", ["learning", "fast"]),
        ("--bits 4", ["--bits", "4", "16"]),
        ("--image_aspect_ratio anyres", ["image_aspect_ratio", "anyres", "square, pad"]),
        ("--mm_use_im_start_end True", ["mm_use_im_start_end", "not supported"]),
        ("--rearrange_image_features True", ["rearrange_image_features", "ignores"]),
        ("--evaluation_strategy steps", ["eval_strategy", "no"]),
        ("--warmup_ratio 3", ["warmup_ratio", "below 1", "warmup_steps"]),
        ("--deepspeed nowhere.json", ["nowhere.json", "zero2.json"]),
        ("--data_path nowhere.json", ["data_path", "nowhere.json", "does not exist"]),
        ("--pretrain_mm_mlp_adapter nowhere.bin", ["pretrain_mm_mlp_adapter", "does not exist"]),
        ("--group_by_length True --group_by_modality_length True", ["group_by_length", "contradicts"]),
        ("--group_by_modality_length True --sampling sequential", ["contradicts", "sampling"]),
        ("--label_smoothing_factor 0.1", ["label_smoothing_factor", "0.1", "leave it out"]),
        ("--resume_from_checkpoint checkpoint-4", ["resume_from_checkpoint", "the same command continues"]),
        ("--lora_enable True --tune_mm_mlp_adapter True", ["lora_enable", "tune_mm_mlp_adapter"]),
        ("--mm_projector_type mlp2x", ["mm_projector_type", "'mlp2x'", "linear", "mlpNx_gelu"]),
        ("--learning_rate -1", ["learning_rate", "-1", "from 0"]),
        ("--learning_rate nan", ["learning_rate", "nan", "from 0"]),
        ("--per_device_train_batch_size 0", ["per_device_train_batch_size", "from 1"]),
        ("--model_max_length 0", ["model_max_length", "from 1"]),
        ("--lora_enable True --lora_r 0", ["lora_r", "from 1"]),
        ("--lora_enable True --lora_weight_path nowhere", ["lora_weight_path", "does not exist"]),
        ("--lora_weight_path nowhere", ["lora_weight_path", "does nothing without --lora_enable True"]),
        ("--lora_merge False", ["lora_merge", "does nothing without --lora_enable True"]),
        ("--lora_enable True --freeze_backbone True", ["freeze_backbone", "does nothing with --lora_enable"]),
        ("--mm_projector_lr 1e-5 --freeze_mm_mlp_adapter True", ["mm_projector_lr", "projector that trains"]),
        ("--mm_projector_lr 0", ["mm_projector_lr 0", "above 0", "--freeze_mm_mlp_adapter True"]),
        (
            "--tune_mm_mlp_adapter True --freeze_mm_mlp_adapter True",
            ["freeze_mm_mlp_adapter", "nothing would train"],
        ),
        ("--normalize_projector maybe", ["normalize_projector", "maybe"]),
        ("--attn_implementation flash", ["--attention", "'flash'", "sdpa, varlen, eager, flash_attention_2"]),
        ("--fusion compile --deepspeed zero3.json", ["--fusion", "does not go together with zero3", "zero2"]),
        ("--fusion liger --use_cpu True", ["--fusion", "for GPUs only", "none or compile"]),
        ("--checkpoint_layers 0", ["--checkpoint_layers", "'0'", "a number N from 1"]),
        ("--checkpoint_layers -1", ["--checkpoint_layers", "'-1'", "a number N from 1"]),
        (
            "--checkpoint_layers none --gradient_checkpointing True",
            ["--checkpoint_layers none", "contradicts"],
        ),
        ("stray --bf16 True", ["stray"]),
    ],
)
def test_mistakes_are_named(base, flags, words):
    given = flags.split()
    argv = given + base if given[0] == "stray" else base + given
    with pytest.raises(TrainingError) as error:
        parse(argv)
    for word in words:
        assert word in str(error.value)


@pytest.mark.slow
def test_deepspeed_stays_on_the_cpu_of_a_machine_with_a_gpu(base):
    """What torch says of a GPU stands for the GPU; DeepSpeed would take it."""
    script = (
        "import sys, torch\n"
        "torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1\n"
        "torch.cuda.get_device_capability = lambda *_: (8, 0)\n"
        "from llava_ext.training.arguments import parse\n"
        "device = parse(sys.argv[1:]).training.device.type\n"
        "from deepspeed.accelerator import get_accelerator\n"
        "print(device, get_accelerator().device_name())"
    )
    flags = ["--use_cpu", "True", "--deepspeed", "zero2.json"]
    done = subprocess.run(
        [sys.executable, "-c", script, *base, *flags],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1:] == ["cpu cpu"], done.stderr


@pytest.mark.parametrize(
    "flags",
    [
        "--final_spatial_size 16",
        "--compression_after_projection True --final_spatial_size 5",
        "--interleave_sparsity 2",
    ],
)
def test_interventions_are_checked_on_the_command_line(base, flags):
    with pytest.raises(InterventionError):
        parse(base + flags.split())


@pytest.mark.parametrize("name", ["model_name_or_path", "data_path", "output_dir"])
def test_what_is_needed_is_asked_for(base, name):
    place = base.index(f"--{name}")
    with pytest.raises(TrainingError, match=name):
        parse(base[:place] + base[place + 2 :])


def test_every_flag_of_transformers_4_37_is_known(base):
    """Scripts written for LLaVA's transformers may use any of its arguments; none may be unknown here."""
    gone = [
        "overwrite_output_dir",
        "evaluation_strategy",
        "per_gpu_train_batch_size",
        "per_gpu_eval_batch_size",
        "warmup_ratio",
        "logging_dir",
        "save_safetensors",
        "no_cuda",
        "use_mps_device",
        "jit_mode_eval",
        "use_ipex",
        "fp16_opt_level",
        "half_precision_backend",
        "tpu_num_cores",
        "tpu_metrics_debug",
        "past_index",
        "fsdp_min_num_params",
        "fsdp_transformer_layer_cls_to_wrap",
        "adafactor",
        "group_by_length",
        "use_legacy_prediction_loop",
        "include_inputs_for_metrics",
        "fp16_backend",
        "push_to_hub_model_id",
        "push_to_hub_organization",
        "push_to_hub_token",
        "mp_parameters",
        "torchdynamo",
        "ray_scope",
        "dispatch_batches",
        "split_batches",
        "include_tokens_per_second",
        "lazy_preprocess",
        "is_multimodal",
        "freeze_backbone",
        "mm_patch_merge_type",
        "mm_vision_select_feature",
        "cache_dir",
        "optim",
        "freeze_mm_mlp_adapter",
        "mpt_attn_impl",
        "double_quant",
        "quant_type",
        "bits",
        "lora_enable",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_weight_path",
        "lora_bias",
        "mm_projector_lr",
        "twoD_vision_embedding",
        "interleave",
        "interleave_sparsity",
        "add_spatial_coordinates",
    ]
    known = [option[2:] for action in make_parser()._actions for option in action.option_strings]
    for name in gone:
        translate([f"--{name}", "0.5" if name == "warmup_ratio" else "False"], known, tf32_works=False)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="FlashAttention-2 works on this machine")
def test_flash_attention_is_refused_where_it_cannot_work(base):
    with pytest.raises(TrainingError, match="flash_attention_2 needs a CUDA GPU"):
        parse([*base, "--attn_implementation", "flash_attention_2"])


def test_transformers_of_another_release_is_one_line(tmp_path):
    """Before anything of it is loaded, which would end in a traceback."""
    described = tmp_path / "transformers-4.57.1.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.1\n")
    done = subprocess.run(
        [sys.executable, "-m", "llava_ext.train", "--help"],
        cwd=REPOSITORY,
        env=environment(PYTHONPATH=f"{tmp_path}:{REPOSITORY}"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not done.stdout
    assert re.fullmatch(
        r"error: transformers 4.57.1 is installed, .*requirements.txt pins .*; run `make env`\n", done.stderr
    )


def test_transformers_of_the_same_release_goes_on(tmp_path, capfd):
    console.require_transformers()
    assert not capfd.readouterr().err
    pins = tmp_path / "requirements.txt"
    pins.write_text("torch==1.0\ntransformers==" + ".".join(version("transformers").split(".")[:2]) + ".99\n")
    console.require_transformers(pins)
    assert "may differ in the last digits" in capfd.readouterr().err


def test_own_flags_say_whether_they_determine_the_result():
    """The parser leaves that out; what a run is by content does not ask for paths, watchdogs and bounds."""
    fields = {item.name: item for kind in KINDS for item in dataclasses.fields(kind)}
    free = {name for name, item in fields.items() if not item.metadata.get("influence", True)}
    assert {"data_path", "vision_tower", "watchdog_minutes", "resume"} <= free
    assert not free & {"version", "pack", "mm_projector_lr", "train_vision_tower", "loss_normalization"}
    assert set(fields) >= identity.WITHOUT_INFLUENCE and not free & identity.WITHOUT_INFLUENCE
    theirs = {item.name for item in dataclasses.fields(TrainingArguments)}
    assert theirs >= identity.WITHOUT_INFLUENCE, "only transformers' names are listed"


def test_own_defaults_are_fields():
    assert {"resume", "watchdog_minutes", "loss_normalization"} <= set(
        LlavaTrainingArguments.__dataclass_fields__
    )


def test_split_flags_reads_both_spellings():
    assert split_flags(["--a", "1", "-2", "--b-c=x", "--d"]) == [
        ("a", ["1", "-2"]),
        ("b_c", ["x"]),
        ("d", []),
    ]


def test_fsdp_needs_several_processes(base, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    arguments = parse([*base, "--fsdp", "True"])
    assert not arguments.training.fsdp
    assert any("--fsdp is ignored: one process" in notice for notice in arguments.notices)


@pytest.mark.parametrize(
    ("given", "board"),
    [
        (["tensorboard", "notinstalled"], True),
        (["tensorboard,notinstalled"], True),
        (["notinstalled"], True),
        (["none"], False),
    ],
)
def test_several_trackers_and_those_that_are_not_installed(base, capfd, given, board):
    training = parse([*base, "--report_to", *given]).training
    assert training.own_tensorboard == board and training.report_to == []
    assert ("--report_to notinstalled: the package is not installed" in capfd.readouterr().err) == board


def test_tensorboard_is_written_only_when_it_is_asked_for(base):
    """`json` stands for a tracker that is installed."""
    training = parse([*base, "--report_to", "json"]).training
    assert not training.own_tensorboard and training.report_to == ["json"]
    assert parse([*base, "--report_to", "json", "tensorboard"]).training.own_tensorboard


def test_a_folder_of_a_trackers_name_is_not_the_package(base, tmp_path, monkeypatch, capfd):
    (tmp_path / "notatracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert parse([*base, "--report_to", "notatracker"]).training.report_to == []
    assert "notatracker: the package is not installed" in capfd.readouterr().err
