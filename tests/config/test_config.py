"""Wrong configurations give one readable message: key, value, what is allowed, the fix. Never a traceback."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from workflow_scripts.config import reference
from workflow_scripts.config.load import load_config, load_files
from workflow_scripts.io import UserError, write_json

ROOT = Path(__file__).parent.parent.parent
DEMO = yaml.safe_load((ROOT / "config/config.yaml").read_text())


def changed(path, value):
    """The demo's configuration with one key set (or removed, with ``...``)."""
    raw = copy.deepcopy(DEMO)
    *parents, last = path.split("/")
    here = raw
    for key in parents:
        here = here[int(key)] if isinstance(here, list) else here.setdefault(key, {})
    if value is ...:
        here.pop(last)
    else:
        here[last] = value
    return raw


BAD = [
    # path to the key, value, what the message must contain
    ("stages/finetune/lerning_rate", 1, "stages.finetune.lerning_rate", "did you mean 'learning_rate'?"),
    ("stages/finetune/learning_rate", "fast", "found 'fast'", "a number"),
    ("stages/finetune/learning_rate", -1.0, "found -1.0", "> 0"),
    ("stages/finetune/max_steps", True, "stages.finetune.max_steps", "not true or false"),
    ("stages/finetune/max_steps", 1.5, "stages.finetune.max_steps", "whole number"),
    ("stages/finetune/max_steps", ..., "stages.finetune", "epochs or max_steps"),
    ("stages/finetune/epochs", 1, "stages.finetune", "found both"),
    ("stages/finetune/model_max_length", 16, "stages.finetune.model_max_length: found 16", "more than 16"),
    (
        "experiments/compress_4/finetune",
        {"model_max_length": 4},
        "experiments.compress_4.finetune.model_max_length: found 4",
        "more than 4, the tokens of one picture",
    ),
    ("stages/finetune/survey", {"max_cut_shares": 1}, "stages.finetune.survey", "'max_cut_share'?"),
    ("stages/finetune/prompt_version", "v7", "found 'v7'", "plain, v1"),
    ("stages/finetune/mixture", "shapes_finetun", "did you mean 'shapes_finetune'?", "section mixtures"),
    ("stages/finetune/compute", "cluster", "stages.finetune.compute", "laptop"),
    ("stages/finetune/global_batch_size", 33, "a multiple of 24", "compute.laptop"),
    ("stages/finetune/warmup_ratio", 3, "stages.finetune.warmup_ratio", "<= 1"),
    ("stages/finetune/min_lr_rate", ..., "cosine_with_min_lr", "min_lr_rate"),
    ("stages/pretrain/lora", {"r": 8}, "stages.pretrain.lora", "move it to finetune"),
    ("stages/pretrain", ..., "stages.pretrain", "required"),
    ("stages", ..., "stages", "required"),
    ("experiments", {}, "experiments", "at least 1"),
    ("experiments/a b", {}, "experiments.a b", "form"),
    ("experiments/../x", {}, "experiments", "form"),
    ("experiments/compress_4/interventions/final_spatial_size", 5, "no square number", "1, 4, 16"),
    ("experiments/compress_4/interventions/final_spatial_size", 9, "does not divide", "1, 4, 16"),
    ("experiments/compress_4/interventions/final_spatial_size", ..., "final_spatial_size", "missing"),
    (
        "experiments/vanilla/interventions",
        {"final_spatial_size": 4},
        "without compression_after_projection",
        "final_spatial",
    ),
    (
        "experiments/vanilla/interventions",
        {"interleave_sparsity": 4},
        "without interleave",
        "interleave: true",
    ),
    (
        "experiments/vanilla/interventions",
        {"interleave": True, "interleave_sparsity": 0},
        "interleave_sparsity",
        "from 1",
    ),
    (
        "experiments/vanilla/interventions",
        {"normalise_projector": True},
        "did you mean 'normalize_projector'?",
        "vanilla",
    ),
    ("experiments/vanilla/interventions", {"normalize_projector": "maybe"}, "found 'maybe'", "true or false"),
    (
        "experiments/normalize_multilayer/interventions/multilayer_layers",
        [1, 9],
        "multilayer_layers",
        "1 to 4",
    ),
    ("stages/finetune/seed", -1, "found -1", ">= 0"),
    ("stages/finetune/seed", 2**64, "stages.finetune.seed", "< 4294967296"),
    ("mixtures/shapes_pretrain/seed", -1, "mixtures.shapes_pretrain.seed", ">= 0"),
    ("sources/shapes_test/seed", -1, "sources.shapes_test.seed", ">= 0"),
    ("model/projector_type", "identity", "model.projector_type", "no weights to train"),
    (
        "experiments/compress_4/interventions/final_spatial_size",
        16,
        "fewer than the 16 tokens",
        "leave both out",
    ),
    (
        "experiments/vanilla/finetune",
        {"global_batch_size": 36},
        "experiments.vanilla.finetune.global_batch_size",
        "24",
    ),
    (
        "experiments/vanilla/finetune",
        {"train_projector": False, "mm_projector_lr": 1e-4},
        "the projector does not train",
        "leave it out",
    ),
    (
        "experiments/vanilla/finetune",
        {"max_stepz": 4},
        "experiments.vanilla.finetune.max_stepz",
        "'max_steps'",
    ),
    ("experiments/vanilla/model", {"llm": "tiny_tower"}, "experiments.vanilla.model.llm", "role: llm"),
    ("experiments/vanilla/model", {"projector_type": "mlp2x_glue"}, "mlp2x_glue", "mlp"),
    ("model/vision_tower", "clip", "model.vision_tower", "tiny_tower"),
    ("model/vision_feature_layer", -9, "model.vision_feature_layer", "-5 to 4"),
    ("models/tiny_llm/kind", "shape_llm", "models.tiny_llm.kind", "did you mean 'shapes_llm'?"),
    ("models/tiny_llm/kind", ..., "models.tiny_llm.kind", "shapes_tower"),
    (
        "models/vicuna",
        {"kind": "hub", "role": "llm", "repo": "lmsys/vicuna-7b-v1.5", "revision": "main"},
        "models.vicuna.revision",
        "found 'main'",
    ),
    (
        "models/mine",
        {"kind": "path", "role": "llm", "path": "/no/such/folder"},
        "models.mine.path",
        "config.json",
    ),
    ("sources/mine", {"kind": "path", "images": "/no/such.zip"}, "sources.mine.images", "exists"),
    ("sources/shapes_test/splitt", "x", "sources.shapes_test.splitt", "did you mean 'split'?"),
    ("sources/shapes_captions/damage/truncated", -2, "sources.shapes_captions.damage.truncated", ">= 0"),
    (
        "mixtures/shapes_pretrain/parts/0/policy/corrupt",
        "keeep",
        "parts[0].policy.corrupt",
        "did you mean 'keep'?",
    ),
    (
        "mixtures/shapes_pretrain/parts/0/policy/records",
        {"system_trun": "drop"},
        "parts[0].policy.records",
        "did you mean 'system_turn'?",
    ),
    (
        "mixtures/shapes_pretrain/parts/0/policy/records",
        {"video": "fix"},
        "video: found 'fix'",
        "allowed are keep, drop, fail",
    ),
    (
        "mixtures/shapes_pretrain/parts/0/annotations",
        "shapes",
        "mixtures.shapes_pretrain.parts[0].annotations",
        "shapes_captions",
    ),
    (
        "mixtures/shapes_pretrain/parts/0/images/0/source",
        "nowhere",
        "parts[0].images[0].source",
        "section sources",
    ),
    ("compute/laptop/nodes", 2, "compute.laptop", "set parallel to ddp"),
    ("compute/laptop/precision", "fp16", "needs a GPU", "precision"),
    ("compute/laptop/offload", "optimizer", "zero2 or zero3", "offload"),
    ("compute/laptop/save_before_end_s", 1790, "leaves 10 s of runtime_min: 30", "raise runtime_min"),
    (
        "compute/cluster",
        {"gpus_per_node": 8, "parallel": "ddp", "gres": "gpu:a100:4"},
        "asks for 4 GPUs",
        "set gres: gpu:a100:8",
    ),
    (
        "compute/cluster",
        {"gpus_per_node": 8, "parallel": "ddp", "gres": "gpu:a100"},
        "asks for 1 GPUs",
        "set gres: gpu:a100:8",
    ),
    (
        "compute/cluster",
        {"gpus_per_node": 1, "packing": True},
        "packing: true with attention: sdpa",
        "set kernels.attention: varlen",
    ),
    ("compute/laptop/memory", 3, "compute.laptop.memory", "mem_mb"),
    (
        "evaluation/tasks/shapes/source",
        "shapes_tests",
        "evaluation.tasks.shapes.source",
        "did you mean 'shapes_test'?",
    ),
    ("evaluation/baseline", "vanila", "evaluation.baseline", "did you mean 'vanilla'?"),
    ("evaluation/tasks/shapes/metric", "exact", "evaluation.tasks.shapes.metric", "'exact_match'"),
    ("evaluation/tasks/shapes/kind", "table", "evaluation.tasks.shapes", "add fields: {}"),
    ("evaluation/tasks/shapes/shots", 5, "there is no such key here", "prompt_prefix"),
    ("evaluation/tasks", {}, "evaluation.tasks", "correct it"),
    (
        "experiments/vanilla/tasks",
        ["pope"],
        "experiments.vanilla.tasks[0]",
        "section evaluation.tasks: shapes",
    ),
    ("experimentz", {}, "experimentz", "did you mean 'experiments'?"),
]


@pytest.mark.parametrize(
    ("path", "value", "first", "second"), BAD, ids=[f"{number}-{bad[0]}" for number, bad in enumerate(BAD)]
)
def test_a_bad_value_is_named_with_the_fix(path, value, first, second):
    with pytest.raises(UserError) as caught:
        load_config(changed(path, value), ["my.yaml"])
    message = str(caught.value)
    assert message.startswith("my.yaml: ")
    assert first in message
    assert second in message
    assert "fix: " in message
    assert "pydantic" not in message


def test_all_problems_come_in_one_message():
    raw = changed("stages/finetune/learning_rate", "fast")
    raw["compute"]["laptop"]["cpus"] = 0
    raw["unknown"] = 1
    with pytest.raises(UserError, match="3 problems"):
        load_config(raw)


def test_the_demo_is_valid_and_its_experiments_are_complete():
    loaded = load_files([ROOT / "config/config.yaml"])
    assert loaded.names == ["vanilla", "normalize", "normalize_multilayer", "compress_4", "compress_1"]
    assert loaded.experiments["compress_4"].interventions.final_spatial_size == 4
    assert loaded.experiments["vanilla"].interventions.is_vanilla
    assert not loaded.warnings


def test_a_picture_of_576_tokens_needs_more_than_512():
    """Known before anything is fetched; with few tokens per picture the same length is allowed."""
    raw = yaml.safe_load((ROOT / "config/llava-v1.5-7b.yaml").read_text())
    raw.pop("evaluation")  # its baseline is not among the experiments that are kept below
    raw["stages"]["finetune"]["model_max_length"] = 512
    with pytest.raises(UserError) as error:
        load_config(raw)
    assert "stages.finetune.model_max_length: found 512; allowed: more than 576" in str(error.value)
    assert str(error.value).count("model_max_length") == 1
    raw["experiments"] = {name: raw["experiments"][name] for name in ("compress_1", "compress_64")}
    load_config(raw)
    interleaved = {
        "interleave": True,
        "interleave_sparsity": 1,
        **raw["experiments"]["compress_64"]["interventions"],
    }
    raw["experiments"]["interleaved"] = {"interventions": interleaved, "finetune": {"model_max_length": 128}}
    with pytest.raises(UserError, match=r"experiments.interleaved.finetune.model_max_length: found 128"):
        load_config(raw)


def test_the_former_section_of_one_task_is_that_task():
    former = {"source": "shapes_test", "pictures": 300, "permute_seed": 3, "blank_colour": [226, 226, 226]}
    found = load_config(changed("evaluation", {**former, "task": "shapes"})).config.evaluation
    spec = found.tasks["shapes"]
    assert list(found.tasks) == ["shapes"] and (spec.kind, spec.pictures, spec.permute_seed) == (
        "shapes",
        300,
        3,
    )
    assert load_config(changed("evaluation", former)).config.evaluation == found


def test_identical_experiments_are_pointed_out():
    loaded = load_config(changed("experiments/again", {}))
    assert loaded.warnings == ["experiments vanilla and again are identical: they share one training"]


def test_an_override_of_the_length_replaces_the_other_kind_of_length():
    loaded = load_config(changed("experiments/vanilla/finetune", {"epochs": 2}))
    assert loaded.experiments["vanilla"].stage("finetune").epochs == 2
    assert loaded.experiments["vanilla"].stage("finetune").max_steps is None


def test_the_generated_schema_and_page_are_up_to_date():
    for name, text in reference.generated().items():
        assert (ROOT / name).read_text() == text, f"{name} is out of date; run `make docs`"


def test_every_key_is_explained():
    def walk(name, schema):
        for key, field in schema.get("properties", {}).items():
            if key != "kind":
                assert field.get("description"), f"{name}.{key} has no docstring"

    schema = reference.json_schema()
    walk("Config", schema)
    for name, section in schema["$defs"].items():
        walk(name, section)


def test_snakemake_shows_the_message_without_a_traceback(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump(changed("stages/finetune/lerning_rate", 1)))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "snakemake",
            "-s",
            ROOT / "Snakefile",
            "-n",
            "--configfile",
            bad,
            "--directory",
            tmp_path,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 1
    assert "did you mean 'learning_rate'?" in output
    assert "Traceback" not in output


def test_parsing_loads_nothing_heavy():
    code = (
        "import sys, pathlib;from workflow_scripts.plan.plan import read_plan;"
        " read_plan([pathlib.Path('config/config.yaml')]);print([m for m in ('torch', 'transformers',"
        " 'pyarrow', 'numpy', 'PIL', 'requests') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("kind", ["path", "hub"])
@pytest.mark.parametrize(
    ("tower", "refused"), [("siglip_vision_model", True), ("clip_vision_model", False), ("dinov2", False)]
)
def test_cls_patch_is_refused_for_a_tower_without_a_class_token(kind, tower, refused, tmp_path, monkeypatch):
    """Where its files are here: the user's own folder, or what was fetched and prepared."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models/demo_tower/model"
    write_json(folder / "config.json", {"model_type": "whole", "vision_config": {"model_type": tower}})
    write_json(folder.parent / "manifest.json", {"repo": "owner/tower"})
    own = {"kind": "path", "path": str(folder)}
    hub = {"kind": "hub", "repo": "owner/tower", "revision": "abcdef0"}
    raw = changed("models/demo_tower", {"role": "vision_tower", **(own if kind == "path" else hub)})
    raw["model"] = {"llm": raw["model"]["llm"], "vision_tower": "demo_tower"}
    raw["experiments"] = {"vanilla": {}, "kept": {"model": {"vision_feature_select": "cls_patch"}}}
    if not refused:
        load_config(raw)
        return
    with pytest.raises(
        UserError, match=r"experiments\.kept\.model\.vision_feature_select: found 'cls_patch'"
    ):
        load_config(raw)
    del raw["experiments"]["kept"]
    load_config(raw)


def test_kernels_have_a_section_and_their_keys_of_before_stay():
    from workflow_scripts.config.compute import ComputeSpec

    before = ComputeSpec.model_validate({"attention": "eager", "gradient_checkpointing": True})
    now = ComputeSpec.model_validate({"kernels": {"attention": "eager", "checkpoint_layers": "all"}})
    assert before == now and ComputeSpec.model_validate({"gradient_checkpointing": False}) == ComputeSpec()
    assert ComputeSpec.model_validate(now.model_dump(mode="json")) == now
    for wrong, words in (
        ({"attention": "eager", "kernels": {}}, "leave attention out and set kernels.attention"),
        ({"gradient_checkpointing": 3}, "gradient_checkpointing: found 3"),
        ({"kernels": {"checkpoint_layers": 0}}, "checkpoint_layers"),
        ({"kernels": {"fusion": "liger"}}, "kernels.fusion: liger has kernels for GPUs only"),
        (
            {"kernels": {"fusion": "compile"}, "parallel": "zero3", "processes_per_node": 2},
            "kernels.fusion: compile does not go together with zero3",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            ComputeSpec.model_validate(wrong)
