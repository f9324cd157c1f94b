"""What a training does with its data and its flags: each test is a real one, of a few steps, through the
command line.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llava_ext import convert
from llava_ext.checkpoints import adapters, keys, original, tensors
from llava_ext.checkpoints.stored import load_model
from llava_ext.training import recompute, setup
from llava_ext.training.trainer import LlavaTrainer
from tests.support.trainings import GOLDEN, REPOSITORY, command_line, losses, result, rows, run

SHORT = {"max_steps": 3, "gradient_accumulation_steps": 1, "save_strategy": "no", "num_train_epochs": None}


def short(stage, folder, **changes):
    return command_line(stage, folder, **SHORT | changes)


def ok(outcome):
    status, text = outcome
    assert status == 0, text[-3000:]
    return text


def stopped(outcome, *words):
    """The training ended with one readable message."""
    status, text = outcome
    assert status == 1, text[-3000:]
    assert "Traceback" not in text
    for word in words:
        assert word in text
    return text


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Final weights by the original layout's names."""
    model, _, _ = load_model(folder)
    return keys.state_to_original(model.state_dict(), model.config.interventions)


def base_weights() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "llm" / "model.safetensors")


def changed(ours, theirs):
    """Names of the parameters that differ."""
    return {name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)}


# -- what trains ------------------------------------------------------------------------------------------


def test_stage_1_changes_the_projector_only(tmp_path, train_here):
    ok(train_here(short(1, tmp_path)))
    assert sorted(path.name for path in tmp_path.glob("mm_projector*")) == [
        "mm_projector.bin",
        "mm_projector.safetensors",
    ]
    assert not (tmp_path / "model.safetensors").exists()
    assert original.is_original(tmp_path)
    assert result(tmp_path)["status"] == "finished" and "mm_projector.bin" in result(tmp_path)["files"]
    model, _, _ = load_model(tmp_path, llm=GOLDEN / "llm", tower=GOLDEN / "clip_g4")
    assert not changed(keys.state_to_original(model.state_dict(), model.config.interventions), base_weights())


def test_stage_2_changes_all_but_the_tower(tmp_path, train_here):
    ok(train_here(short(2, tmp_path)))
    final = weights(tmp_path)
    # Rows of the embedding table that no sample uses stay; whole matrices do not.
    assert changed(final, base_weights()) == set(base_weights())
    tower = load_file(GOLDEN / "clip_g4" / "model.safetensors")
    names = {name.removeprefix("vision_model."): tensor for name, tensor in tower.items()}
    assert not changed(
        {name.removeprefix(keys.ORIGINAL_TOWER): tensor for name, tensor in final.items()}, names
    )


def test_freeze_backbone_leaves_lm_head_to_train_as_llava_does(tmp_path, train_here):
    ok(train_here(short(2, tmp_path, freeze_backbone=True)))
    assert changed(weights(tmp_path), base_weights()) == {"lm_head.weight"}


def test_freeze_mm_mlp_adapter(tmp_path, train_here):
    ok(train_here(short(2, tmp_path, freeze_mm_mlp_adapter=True)))
    start = tensors.read_tensors(GOLDEN / "train" / "vanilla_stage1_mm_projector.bin")
    assert not changed(weights(tmp_path), start)


def test_mm_projector_lr_of_zero_decay_group_moves_only_the_rest(tmp_path, train_here):
    """A tiny rate of its own: the projector hardly moves while the LLM does."""
    ok(train_here(short(2, tmp_path, mm_projector_lr=1e-9)))
    start = tensors.read_tensors(GOLDEN / "train" / "vanilla_stage1_mm_projector.bin")
    final = weights(tmp_path)
    assert max((final[name] - tensor).abs().max().item() for name, tensor in start.items()) < 1e-7
    assert changed(final, base_weights())


def test_lora_trains_adapters_and_merges_them(tmp_path, train_here):
    ok(
        train_here(
            short(2, tmp_path, lora_enable=True, lora_r=4, lora_alpha=8, lora_dropout=0.1, learning_rate=1e-2)
        )
    )
    final = weights(tmp_path)
    moved = changed(final, base_weights())
    assert moved and all(name.endswith("_proj.weight") for name in moved)
    assert len(moved) == 4 * 7
    delta = (
        final["model.layers.0.self_attn.q_proj.weight"]
        - base_weights()["model.layers.0.self_attn.q_proj.weight"]
    )
    assert torch.linalg.matrix_rank(delta, rtol=1e-4) <= 4
    start = tensors.read_tensors(GOLDEN / "train" / "vanilla_stage1_mm_projector.bin")
    assert changed(final, start) == set(start)


def test_files_follow_the_umask_and_not_safetensors(tmp_path, train_here):
    before = os.umask(0o027)
    try:
        ok(train_here(short(1, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)))
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert any("checkpoint-1" in str(path) for path in modes)
    assert {str(path): oct(mode) for path, mode in modes.items() if mode != 0o640} == {}


@pytest.mark.parametrize(("stage", "changes"), [(1, {}), (2, {"save_strategy": "no"}), (2, {"bf16": True})])
def test_the_disk_check_counts_what_is_written(stage, changes, tmp_path, train_here, monkeypatch):
    argv = short(stage, tmp_path, **{"max_steps": 1, "save_strategy": "steps", "save_steps": 1} | changes)
    counted = []
    count = setup.bytes_to_write
    monkeypatch.setattr(setup, "bytes_to_write", lambda *given: counted.append(count(*given)) or counted[-1])
    ok(train_here(argv))
    kinds = (".safetensors", ".bin", ".pt")
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.suffix in kinds)
    assert written / 1.2 < counted[0] <= written


def test_a_disk_that_is_too_small_is_said_before_the_first_step(tmp_path, train_here, monkeypatch):
    """The model is the test's, its size is not."""
    monkeypatch.setattr(setup, "bytes_to_write", lambda *_: 10**18)
    words = ("GiB are free, one checkpoint and the final weights need", "931322574.6 GiB; make room")
    stopped(train_here(short(1, tmp_path, save_strategy="steps")), *words)
    stopped(train_here(short(1, tmp_path)), "GiB are free, the final weights need")


def test_a_compression_to_all_tokens_is_refused(tmp_path, train_here):
    """The tower has 4x4 patches."""
    flags = {"compression_after_projection": True, "final_spatial_size": 16}
    stopped(train_here(short(1, tmp_path, **flags)), "--final_spatial_size 16", "no compression")


def test_a_projector_of_another_layer_of_the_tower_is_refused(tmp_path, train_here):
    """What stage 1 took of the tower is in the config.json beside its projector; -2 of 3 layers is also 2."""
    folder = tmp_path / "one"
    ok(train_here(short(1, folder, max_steps=1)))
    depth = json.loads((GOLDEN / "clip_g4/config.json").read_text())["num_hidden_layers"]
    flags = {"pretrain_mm_mlp_adapter": folder, "max_steps": 1}
    stopped(
        train_here(short(2, tmp_path / "two", mm_vision_select_layer=-1, **flags)),
        "--mm_vision_select_layer -1",
        f"{folder} was trained with -2",
    )
    stopped(
        train_here(short(2, tmp_path / "two", mm_vision_select_feature="cls_patch", **flags)),
        "--mm_vision_select_feature cls_patch",
        "was trained with patch",
    )
    ok(train_here(short(2, tmp_path / "three", mm_vision_select_layer=depth - 1, **flags)))
    stopped(
        train_here(
            short(2, tmp_path / "four", model_name_or_path=tmp_path / "three", mm_vision_select_layer=-1)
        ),
        "--mm_vision_select_layer -1",
        f"was trained with {depth - 1}",
    )


def test_adapters_that_are_kept_load_with_peft_and_convert(tmp_path, train_here, monkeypatch):
    """By the names of the language model alone, on the base that they name; with LLaVA's files beside
    them.
    """
    ok(train_here(short(2, tmp_path, lora_enable=True, lora_merge=False, lora_r=4, learning_rate=1e-2)))
    folder = tmp_path / "adapters"
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base) == GOLDEN / "llm"
    plain = AutoModelForCausalLM.from_pretrained(base)
    final, tokenizer, _ = load_model(tmp_path)
    words = tokenizer("USER: What is it? ASSISTANT: A circle.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = plain.eval()(words).logits
        adapted = PeftModel.from_pretrained(plain, folder).eval()(words).logits
        merged = final.eval()(input_ids=words).logits
    torch.testing.assert_close(adapted, merged, atol=1e-5, rtol=0)
    assert (adapted - before).abs().max() > 1e-3
    assert tensors.read_tensors(folder / "non_lora_trainables.bin").keys() == {
        f"base_model.model.{name}" for name in tensors.read_tensors(folder / "mm_projector.bin")
    }
    monkeypatch.chdir(GOLDEN)
    convert.main([str(folder), str(tmp_path / "hf"), "--to", "hf"])
    ours, theirs = weights(tmp_path / "hf"), weights(tmp_path)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_adapters_train_on(tmp_path, train_here):
    """With a rate of nothing: what was loaded is what is saved, by either kind of names."""
    lora = {"lora_enable": True, "lora_merge": False, "lora_r": 4, "max_steps": 1}
    ok(train_here(short(2, tmp_path / "one", learning_rate=1e-2, **lora)))
    folder = tmp_path / "one/adapters"
    inside = tmp_path / "inside"
    shutil.copytree(folder, inside)
    first = load_file(folder / "adapter_model.safetensors")
    save_file({adapters.name_inside(n): t for n, t in first.items()}, inside / "adapter_model.safetensors")
    for number, start in enumerate((folder, inside)):
        ok(train_here(short(2, tmp_path / str(number), learning_rate=0, lora_weight_path=start, **lora)))
        again = load_file(tmp_path / str(number) / "adapters/adapter_model.safetensors")
        assert again.keys() == first.keys() and not changed(again, first)
    ok(
        train_here(
            short(
                2,
                tmp_path / "llava",
                **lora | {"model_name_or_path": tmp_path / "one", "pretrain_mm_mlp_adapter": None},
            )
        )
    )
    on_llava = load_file(tmp_path / "llava/adapters/adapter_model.safetensors")
    assert on_llava.keys() == {adapters.name_inside(name) for name in first}, "a whole LLaVA is their base"
    save_file(
        {"base_model.model.model.layers.99.q_proj.lora_A.weight": torch.ones(4, 4)},
        inside / "adapter_model.safetensors",
    )
    stopped(
        train_here(short(2, tmp_path / "x", lora_weight_path=inside, **lora)),
        f"{inside}: its adapters do not fit this model",
    )


# -- loss -------------------------------------------------------------------------------------------------


def test_packing_gives_the_same_losses(tmp_path, train_here):
    ok(train_here(short(2, tmp_path / "padded")))
    ok(train_here(short(2, tmp_path / "packed", pack=True)))
    for ours, theirs in zip(losses(tmp_path / "packed"), losses(tmp_path / "padded"), strict=True):
        assert ours[1] == pytest.approx(theirs[1], abs=2e-5)
        assert ours[3] == pytest.approx(theirs[3], rel=1e-4)


def test_loss_normalization(tmp_path, train_here):
    """`token` does not depend on how a global batch is split; LLaVA's mean of means does."""
    both = {}
    for kind in ("token", "micro_batch"):
        for size in (4, 2):
            folder = tmp_path / f"{kind}{size}"
            flags = {
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": 8 // size,
                "max_steps": 1,
            }
            ok(
                train_here(
                    short(
                        2,
                        folder,
                        loss_normalization=kind,
                        sampling="sequential",
                        group_by_modality_length=None,
                        **flags,
                    )
                )
            )
            both[kind, size] = rows(folder)[0]["loss"]
    assert both["token", 4] == pytest.approx(both["token", 2], abs=1e-5)
    assert abs(both["micro_batch", 4] - both["micro_batch", 2]) > 1e-4


def test_bf16_on_the_cpu(tmp_path, train_here):
    ok(train_here(short(2, tmp_path / "half", bf16=True, gradient_checkpointing=True)))
    ok(train_here(short(2, tmp_path / "full")))
    assert all(
        tensor.dtype == torch.bfloat16
        for tensor in load_file(tmp_path / "half" / "model.safetensors").values()
    )
    for half, full in zip(losses(tmp_path / "half"), losses(tmp_path / "full"), strict=True):
        assert half[1] == pytest.approx(full[1], abs=0.05)


def test_caching_samples_changes_nothing(tmp_path, train_here):
    ok(train_here(short(2, tmp_path / "plain")))
    ok(train_here(short(2, tmp_path / "cached", cache_pixels=50)))
    assert losses(tmp_path / "plain") == losses(tmp_path / "cached")


# -- flags reach the result -------------------------------------------------------------------------------


def test_a_checkpoint_of_the_published_interventions_describes_itself(tmp_path, train_here):
    flags = {"normalize_projector": True, "use_multilayer_features": True, "pretrain_mm_mlp_adapter": None}
    ok(train_here(short(2, tmp_path, **flags)))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (
        config["model_type"] == "spatial_llava"
        and config["normalize_projector"]
        and config["projector_max_norm"] == 1.22
    )
    assert (tmp_path / "modeling_spatial_llava.py").is_file()


def test_a_projector_of_other_interventions_is_refused(tmp_path, train_here):
    ok(train_here(short(1, tmp_path / "one", normalize_projector=True)))
    adapter = tmp_path / "one" / "mm_projector.bin"
    stopped(
        train_here(short(2, tmp_path / "two", pretrain_mm_mlp_adapter=adapter)),
        "normalize_projector: False against True",
    )
    (tmp_path / "one" / "config.json").unlink()  # a bare file is judged by its keys
    stopped(
        train_here(short(2, tmp_path / "two", pretrain_mm_mlp_adapter=adapter)),
        "norm.weight: not in this model",
    )
    ok(train_here(short(2, tmp_path / "two", pretrain_mm_mlp_adapter=adapter, normalize_projector=True)))


def test_training_goes_on_from_a_finished_checkpoint(tmp_path, train_here):
    """`--model_name_or_path` may be a LLaVA checkpoint; other interventions than its own are refused."""
    ok(train_here(short(2, tmp_path / "one")))
    flags = {"model_name_or_path": tmp_path / "one", "pretrain_mm_mlp_adapter": None}
    ok(train_here(short(2, tmp_path / "two", **flags)))
    assert rows(tmp_path / "two")[0]["loss"] < rows(tmp_path / "one")[0]["loss"] - 0.3
    stopped(
        train_here(short(2, tmp_path / "three", normalize_projector=True, **flags)),
        "normalize_projector: True against False",
    )


def test_vicunas_generation_config_does_not_break_the_save(tmp_path, train_here):
    shutil.copytree(GOLDEN / "llm", tmp_path / "llm")
    broken = {"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "llm" / "generation_config.json").write_text(json.dumps(broken))
    ok(train_here(short(2, tmp_path / "out", model_name_or_path=tmp_path / "llm")))
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["do_sample"] is False and "temperature" not in written


def test_metrics_of_every_step(tmp_path, train_here):
    ok(train_here(short(2, tmp_path, report_to="tensorboard")))
    first, *_, last = rows(tmp_path)
    assert {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_s",
        "samples_per_s",
        "epoch",
        "time",
        "supervised_tokens",
    } <= set(first)
    assert last["step"] == 3 and first["supervised_tokens"] > 0
    assert list((tmp_path / "tensorboard").glob("events.*"))


# -- data that can't be used ------------------------------------------------------------------------------


@pytest.fixture
def samples(tmp_path):
    """Writes some samples as a LLaVA JSON."""

    def write(records):
        path = tmp_path / "samples.json"
        path.write_text(json.dumps(records))
        return path

    return write


def question(number, answer, image=None):
    picture = {"image": image} if image else {}
    human = ("<image>\n" if image else "") + "What is this?"
    return {
        "id": f"q{number}",
        **picture,
        "conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": answer}],
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_image_is_named(workers, tmp_path, samples, train_here):
    data = samples([question(number, "A circle.", f"nowhere_{number}.png") for number in range(8)])
    flags = {"data_path": data, "dataloader_num_workers": workers}
    stopped(
        train_here(short(2, tmp_path / "out", **flags)),
        "error: ",
        "record ",
        "id 'q",
        "nowhere_",
        "No such file",
    )


def test_mismatches_stop_before_training(tmp_path, samples, train_here):
    data = samples([question(number, "" if number % 2 else "Yes.") for number in range(12)])
    text = stopped(
        train_here(short(2, tmp_path / "out", data_path=data)),
        "6 of 12 samples",
        "mismatch",
        "--mismatch_bound: 10.0%",
        "id 'q1'",
    )
    assert "step" not in text and not rows(tmp_path / "out")


def test_too_few_labels_stop_before_training(tmp_path, train_here):
    stopped(
        train_here(short(2, tmp_path, supervised_share_bound=0.9)),
        "carry a label",
        "--supervised_share_bound: 90.00%",
    )


def test_too_few_labels_stop_wherever_in_the_data_they_begin(tmp_path, train_here):
    """The look before training may have missed them: here it is switched off, and the bound is one that no
    data keep.
    """
    flags = {"preflight_samples": 0, "supervised_share_bound": 0.5, "watchdog_zero_steps": 2, "max_steps": 6}
    flags["logging_steps"] = 50  # how often is logged is all the same
    text = stopped(
        train_here(short(2, tmp_path / "out", save_strategy="steps", save_steps=1, **flags)),
        "text tokens carried a label in the last 2 steps up to step 2",
        "--supervised_share_bound: 50.00%",
        "id 's2_",
    )
    assert "the last checkpoint is kept" in text and (tmp_path / "out/checkpoint-1/complete.json").is_file()


def test_zero_loss_stops_with_the_samples(tmp_path, samples, train_here):
    data = samples([question(number, "") for number in range(40)])
    flags = {"mismatch_bound": 1, "supervised_share_bound": 0, "watchdog_zero_steps": 3, "max_steps": 8}
    flags["logging_steps"] = 50
    stopped(
        train_here(short(2, tmp_path / "out", data_path=data, **flags)),
        "has been zero for 3 steps up to step 3",
        "id 'q",
    )
    assert "has been zero" in verdict(tmp_path / "out")


def test_a_training_that_continues_knows_of_the_steps_before(tmp_path, samples, train_here):
    records = [question(number, "") for number in range(40)]
    records[8] = question(8, "", "gone.png")  # in step 3
    flags = {"mismatch_bound": 1, "supervised_share_bound": 0, "watchdog_zero_steps": 3, "max_steps": 8}
    flags |= {"sampling": "sequential", "group_by_modality_length": None, "data_path": samples(records)}
    stopped(train_here(short(2, tmp_path / "out", **flags)), "the state after step 2 is saved")
    text = stopped(train_here(short(2, tmp_path / "out", skip_samples="#9", **flags)), "id 'q8'")
    assert "continuing from" in text and "has been zero for 3 steps up to step 3" in text


def test_a_loss_that_is_no_number_stops_before_the_weights_change(tmp_path, train_here):
    flags = {
        "learning_rate": 1e30,
        "warmup_ratio": 0,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    text = stopped(
        train_here(short(2, tmp_path, max_grad_norm=0, **flags)),
        "the loss is nan",
        "samples of this micro-batch",
        "id 's2_",
    )
    step = int(text.split(" at step ")[1].split(";")[0])
    assert (tmp_path / f"checkpoint-{step - 1}" / "complete.json").is_file()


def test_a_batch_without_labels_changes_nothing(tmp_path, samples, train_here):
    """Where LLaVA's weights would become NaN."""
    records = json.loads((GOLDEN / "train" / "stage2.json").read_text())[:8]
    data = samples([question(number, "") for number in range(4)] + records)
    flags = {
        "mismatch_bound": 1,
        "sampling": "sequential",
        "group_by_modality_length": None,
        "warmup_ratio": 0,
    }
    ok(train_here(short(2, tmp_path / "out", data_path=data, **flags)))
    assert [row["loss"] == 0 for row in rows(tmp_path / "out")] == [True, False, False]
    assert result(tmp_path / "out")["metrics"]["batches_without_labels"] == 1


# -- ends that will repeat --------------------------------------------------------------------------------


def verdict(folder):
    found = result(folder)
    assert found["status"] == "verdict"
    return found["reason"]


def test_what_will_repeat_is_a_verdict_with_its_reason(tmp_path, samples, train_here):
    """Whoever starts trainings reads there that another attempt is in vain."""
    (tmp_path / "out").mkdir()
    data = samples([question(number, "A circle.", "nowhere.png") for number in range(8)])
    train_here(short(2, tmp_path / "out", data_path=data, dataloader_num_workers=1))
    assert "nowhere.png: No such file" in verdict(tmp_path / "out")
    train_here(short(2, tmp_path / "out", no_such_flag=1))
    assert "nowhere.png" in verdict(tmp_path / "out"), "what was said first stays until a training starts"
    ok(train_here(short(2, tmp_path / "out")))
    assert result(tmp_path / "out")["status"] == "finished"
    train_here(short(2, tmp_path / "out", learning_rate=1.0))  # refused
    assert result(tmp_path / "out")["status"] == "finished"


def test_a_training_without_a_single_label_is_a_verdict(tmp_path, samples, train_here):
    data = samples([question(number, "") for number in range(12)])
    flags = {"mismatch_bound": 1, "supervised_share_bound": 0, "watchdog_zero_steps": 0}
    stopped(train_here(short(2, tmp_path / "out", data_path=data, **flags)), "not one token of the 3 steps")
    assert "id 'q" in verdict(tmp_path / "out")
    assert not (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_too_little_memory_is_a_verdict_that_says_what_needs_less(kind, tmp_path, monkeypatch, train_here):
    """Of torch's allocator, or of a library that asks CUDA itself."""

    def out_of_memory(*_):
        error = kind("CUDA out of memory. Tried to allocate 2.00 GiB.")
        error.error_code = 2  # as torch sets it
        raise error

    monkeypatch.setattr(LlavaTrainer, "training_step", out_of_memory)
    monkeypatch.setattr(recompute, "gpu_room", lambda training: 250_000_000)  # a GPU as small as the model
    status, text = train_here(short(2, tmp_path / "out", checkpoint_layers=4))
    assert status == 1 and "Tried to allocate 2.00 GiB. By the estimate --checkpoint_layers 3 fits (" in text
    assert "Lower --per_device_train_batch_size" in verdict(tmp_path / "out")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_no_verdict(tmp_path, monkeypatch, train_here, number):
    def fail(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_bytes", fail)
    stopped(train_here(short(2, tmp_path / "out")), os.strerror(number))
    assert not (tmp_path / "out/train_result.json").exists()


def test_a_training_that_another_process_holds_gets_no_verdict(tmp_path, train_here):
    code = (
        "import sys, pathlib; from llava_ext.training import claim\n"
        "claim.claim(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY) as other:
        assert other.stdout.readline() == b"held\n"
        stopped(train_here(short(2, tmp_path / "out", no_such_flag=1)), "no_such_flag")
        assert not (tmp_path / "out/train_result.json").exists()
        other.stdin.close()


@pytest.mark.slow
def test_a_start_that_hangs_is_ended_too(tmp_path):
    """The model lies on a disk that does not answer: no step is ever due, and yet it stops with the
    reason.
    """
    shutil.copytree(GOLDEN / "llm", tmp_path / "llm")
    (tmp_path / "llm/config.json").unlink()
    os.mkfifo(tmp_path / "llm/config.json")
    argv = short(2, tmp_path / "out", model_name_or_path=tmp_path / "llm", watchdog_minutes=0.5)
    text = run(argv, tmp_path / "log", expect=75)
    assert "nothing has gone on for 0.5 minutes while loading the model" in text
    assert "make_trainer" in text
    assert result(tmp_path / "out")["status"] == "stopped"


@pytest.mark.slow
def test_no_step_for_too_long(tmp_path, samples):
    """A read that never returns, as from a network disk that hangs: a named pipe that nobody writes."""
    folder = tmp_path / "images"
    folder.mkdir()
    os.mkfifo(folder / "stuck.png")
    data = samples([question(number, "A circle.", "stuck.png") for number in range(8)])
    text = run(
        short(2, tmp_path / "out", data_path=data, image_folder=folder, watchdog_minutes=0.5),
        tmp_path / "log",
        expect=75,
    )
    assert "no step has ended for 0.5 minutes" in text and "image_bytes" in text
    assert result(tmp_path / "out")["status"] == "stopped"
