"""Finished checkpoints: stock transformers reads vanilla ones, the code saved beside the weights reads the
others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from llava_ext.analysis.generation import answer
from llava_ext.checkpoints.stored import load_model, save_checkpoint
from llava_ext.checkpoints.tensors import read_folder
from llava_ext.data.conversation import inference_prompt, prompt_ids
from llava_ext.model.build import reset_projector
from llava_ext.model.folders import load_tokenizer
from llava_ext.model.interventions import FLAGS, Interventions
from tests.support.models import ALONE, flags, make_batch, make_model, picture

QUESTION = "What color is the circle?"


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory):
    """A saved vanilla checkpoint and the model it came from."""
    folder = tmp_path_factory.mktemp("vanilla") / "hf"
    parts = make_model()
    save_checkpoint(*parts, folder, prompt_version="v1", image_aspect_ratio="pad")
    return folder, parts


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The same with every flag on."""
    folder = tmp_path_factory.mktemp("everything") / "hf"
    parts = make_model(flags(*FLAGS))
    save_checkpoint(*parts, folder, prompt_version="v1", image_aspect_ratio="pad")
    return folder, parts


def chat(question: str = QUESTION) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


# -- the class --------------------------------------------------------------------------------------------


def test_with_all_flags_off_it_equals_the_stock_class_bit_for_bit():
    model, tokenizer, images = make_model()
    model.config.image_token_index = 7  # an id inside the vocabulary, as the stock class needs it
    stock = LlavaForConditionalGeneration(model.config.to_stock())
    stock.load_state_dict(model.state_dict(), strict=True)
    model.model.vision_tower.requires_grad_(False)
    batch = make_batch(model, tokenizer, images)
    batch.pop("image_token_counts")
    for training in (False, True):
        ours, theirs = model.train(training)(**batch), stock.train(training)(**batch)
        assert torch.equal(ours.logits, theirs.logits)
        assert torch.equal(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    for (name, one), (_, other) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        assert "vision_tower" in name or torch.equal(one.grad, other.grad), name


def test_trainer_checkpoints_keep_the_names_in_memory(tmp_path):
    """Trainer resumes with load_state_dict; other names would be ignored with a mere warning."""
    from safetensors.torch import load_file

    model, _, _ = make_model()
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


# -- vanilla ----------------------------------------------------------------------------------------------


def test_vanilla_is_a_stock_checkpoint(vanilla):
    folder, (model, tokenizer, images) = vanilla
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llava", ["LlavaForConditionalGeneration"])
    assert not list(folder.glob("*.py")) and "auto_map" not in config
    stock, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = make_batch(model, tokenizer, images)
    batch.pop("image_token_counts")
    with torch.no_grad():
        ours, theirs = model(**batch).logits, stock.eval()(**batch).logits
    assert torch.allclose(ours, theirs[..., : ours.shape[-1]], atol=1e-6)
    # The rows added for the image token are never the most likely ones.
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_large_checkpoints_come_in_shards(vanilla, tmp_path):
    """Of 5 GB each, here of 50 kB; stock transformers and this package read them as one."""
    folder, (model, tokenizer, images) = vanilla
    save_checkpoint(model, tokenizer, images, tmp_path, prompt_version="v1", max_shard_size="50KB")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(set(index.values())) == shards
    assert read_folder(tmp_path).keys() == read_folder(folder).keys()
    for load in (LlavaForConditionalGeneration.from_pretrained, lambda path: load_model(path)[0]):
        whole, sharded = load(folder).state_dict(), load(tmp_path).state_dict()
        assert whole.keys() == sharded.keys()
        assert all(torch.equal(tensor, sharded[name]) for name, tensor in whole.items())


def test_stock_processor_gives_the_ids_and_pixels_of_training(vanilla):
    folder, (model, tokenizer, images) = vanilla
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is LlavaProcessor
    text = processor.apply_chat_template(chat(), add_generation_prompt=True)
    inputs = processor(images=picture(0), text=text, return_tensors="pt")
    prompt = prompt_ids(tokenizer, inference_prompt(QUESTION, "v1", has_image=True))
    expanded = []
    for token in prompt:
        expanded += [model.config.image_token_id] * 16 if token == -200 else [token]
    assert inputs["input_ids"][0].tolist() == expanded
    pixels = make_batch(model, tokenizer, images)["pixel_values"][:1]
    assert torch.allclose(inputs["pixel_values"], pixels, atol=1e-5)


def test_stock_generation_equals_ours(vanilla):
    folder, parts = vanilla
    stock, processor = (
        LlavaForConditionalGeneration.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    text = processor.apply_chat_template(chat(), add_generation_prompt=True)
    inputs = processor(images=picture(0), text=text, return_tensors="pt")
    new = stock.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    theirs = processor.decode(new, skip_special_tokens=True).strip()
    assert answer(*parts, [(picture(0), QUESTION)], max_new_tokens=8, image_aspect_ratio="pad") == [theirs]


def test_vanilla_comes_back_without_loss(vanilla):
    folder, (model, tokenizer, _) = vanilla
    again, words, pixels = load_model(folder)
    assert again.config.interventions.is_vanilla
    assert state_equal(model, again)
    assert len(words) == len(tokenizer) and pixels.do_pad
    assert words("the <image> word")["input_ids"] == tokenizer("the <image> word")["input_ids"]


def state_equal(one, other) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# -- interventions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_comes_back_without_loss(name, tmp_path):
    model, tokenizer, images = make_model(flags(name))
    save_checkpoint(model, tokenizer, images, tmp_path, prompt_version="v1", image_aspect_ratio="pad")
    stored = json.loads((tmp_path / "config.json").read_text())
    for key, value in ALONE[name].items():
        assert stored[key] == (list(value) if isinstance(value, tuple) else value)
    again, _, _ = load_model(tmp_path)
    assert again.config.interventions == model.config.interventions
    assert state_equal(model, again)
    batch = make_batch(model, tokenizer, images)
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, again.eval()(**batch).loss)


def test_other_projectors_are_saved_as_ours(tmp_path):
    model, tokenizer, images = make_model(projector_type="mlp3x_gelu", vision_feature_select_strategy="full")
    save_checkpoint(model, tokenizer, images, tmp_path, prompt_version="plain", image_aspect_ratio="square")
    again, _, pixels = load_model(tmp_path)
    assert again.config.projector_type == "mlp3x_gelu" and not pixels.do_pad
    assert again.config.tokens_per_image == 17
    assert state_equal(model, again)


LOAD_ELSEWHERE = """
import importlib.util, sys
assert importlib.util.find_spec("llava_ext") is None
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
folder, picture, target = sys.argv[1:]
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).pooling == "average"
try:
    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
    raise AssertionError("code ran without trust")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
model, info = AutoModelForImageTextToText.from_pretrained(
    folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
question = {"type": "text", "text": "What color is the circle?"}
chat = [{"role": "user", "content": [{"type": "image"}, question]}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=Image.open(picture), text=text, return_tensors="pt")
new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
with torch.no_grad():
    logits = model.eval()(**inputs).logits
torch.save({"ids": inputs["input_ids"], "pixels": inputs["pixel_values"], "logits": logits,
            "text": processor.decode(new, skip_special_tokens=True).strip()}, target)
model.save_pretrained(target + ".again", save_original_format=True)
"""


@pytest.mark.slow
def test_a_variant_loads_where_this_package_is_not_installed_and_only_with_trust(everything, tmp_path):
    folder, parts = everything
    model = parts[0]
    picture(0).save(tmp_path / "picture.png")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE, str(folder), "picture.png", "result.pt"],
        cwd=tmp_path, env=environment, check=True, timeout=300,
    )  # fmt: skip
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    with torch.no_grad():
        logits = model(input_ids=result["ids"], pixel_values=result["pixels"]).logits
    assert torch.allclose(logits, result["logits"][..., : logits.shape[-1]], atol=1e-6)
    assert answer(*parts, [(picture(0), QUESTION)], max_new_tokens=8, image_aspect_ratio="pad") == [
        result["text"]
    ]
    again, _ = load_model_only(tmp_path / "result.pt.again")
    assert state_equal(model, again)


def load_model_only(folder: Path):
    """A model whose folder has no processor files."""
    from llava_ext.checkpoints.stored import shrink_vocabulary
    from llava_ext.model.configuration_spatial_llava import SpatialLlavaConfig
    from llava_ext.model.modeling_spatial_llava import SpatialLlavaForConditionalGeneration

    model = SpatialLlavaForConditionalGeneration.from_pretrained(
        folder, config=SpatialLlavaConfig.from_pretrained(folder)
    )
    shrink_vocabulary(model)
    return model, model.config


# -- saving -----------------------------------------------------------------------------------------------


def test_the_same_weights_are_saved_from_a_gathered_state(tmp_path):
    """As under ZeRO-3, where the model itself holds only a part."""
    from safetensors.torch import load_file

    model, tokenizer, images = make_model(flags("normalize_projector"))
    save_checkpoint(model, tokenizer, images, tmp_path / "a")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    save_checkpoint(model, tokenizer, images, tmp_path / "b", state_dict=state)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_failed_save_leaves_the_old_checkpoint(vanilla, tmp_path):
    _, (model, tokenizer, images) = vanilla
    save_checkpoint(model, tokenizer, images, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    bad = model.generation_config
    try:
        model.generation_config = GenerationConfig(length_penalty=2.0)  # means nothing without beams
        with pytest.raises(ValueError, match="GenerationConfig is invalid"):
            save_checkpoint(model, tokenizer, images, tmp_path)
    finally:
        model.generation_config = bad
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_published_hub_checkpoints_are_read(tmp_path):
    """Their vocabulary has rows for the image token already, and no field of ours."""
    model, tokenizer, images = make_model()
    save_checkpoint(model, tokenizer, images, tmp_path, prompt_version="v1")
    config = LlavaConfig.from_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored.pop("llm_vocab_size")
    (tmp_path / "config.json").write_text(json.dumps(stored))
    again, _, _ = load_model(tmp_path)
    assert again.lm_head.weight.shape[0] == config.text_config.vocab_size == 2048
    assert again.config.image_token_id == 2000


def test_missing_weights_are_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    from llava_ext.model.folders import BuildError

    model, tokenizer, images = make_model()
    save_checkpoint(model, tokenizer, images, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("multi_modal_projector.linear_1.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BuildError, match=r"missing keys, e\.g\. .*linear_1"):
        load_model(tmp_path)


def test_a_saved_tokenizer_still_gives_training_ids(vanilla):
    """`<image>` in a text without picture is ordinary text, also after a round trip."""
    folder, (_, tokenizer, _) = vanilla
    again = load_tokenizer(folder)
    for text in ("plain", " <image> word", "a<image>b</s>c", "▁mark"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_new_projector_is_the_same_in_every_precision():
    """Not drawn in the precision of the engine: DDP keeps float32, DeepSpeed bfloat16, and both start from
    one projector.
    """
    projector = make_model()[0].model.multi_modal_projector
    drawn = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        reset_projector(projector.to(dtype))
        drawn[dtype] = [parameter.detach().clone() for parameter in projector.parameters()]
    for single, half in zip(drawn[torch.float32], drawn[torch.bfloat16], strict=True):
        assert torch.equal(single.bfloat16(), half)


def test_bfloat16_models_run_and_answer():
    model, tokenizer, images = make_model(flags(*FLAGS), dtype=torch.bfloat16)
    reference, _, _ = make_model(flags(*FLAGS))
    batch = make_batch(model, tokenizer, images)
    with torch.no_grad():
        assert float(model(**batch).loss) == pytest.approx(float(reference(**batch).loss), rel=0.02)
    assert (
        len(
            answer(
                model, tokenizer, images, [(picture(0), QUESTION)], image_aspect_ratio="pad", max_new_tokens=4
            )
        )
        == 1
    )


def test_auto_statistics_survive_saving(tmp_path):
    chosen = Interventions(normalize_projector=True, normalize_statistics="auto")
    model, tokenizer, images = make_model(chosen)
    save_checkpoint(model, tokenizer, images, tmp_path)
    again, _, _ = load_model(tmp_path)
    assert again.config.projector_max_norm == model.config.projector_max_norm
    assert again.config.normalize_statistics == "auto"
