"""The demo's models: ordinary folders, a tokenizer that fits LLaVA's masks, a tower that has learned
something.
"""

import random

import pytest
import torch
from pydantic import ValidationError
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    GenerationConfig,
)

from llava_ext.files import sha256
from tests.support.demo import load_json
from workflow_scripts.config.shapes import ShapesLlm, ShapesSource, ShapesTower
from workflow_scripts.demo import models as shapes_models
from workflow_scripts.demo import shapes


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)


def test_a_reloaded_tokenizer_gives_the_same_ids(llm, tmp_path):
    built, loaded = shapes_models.build_tokenizer(), AutoTokenizer.from_pretrained(llm)
    loaded.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = [
        *shapes_models.corpus(),
        "USER: a b</s>USER: c",
        "Größe 日本 \n\n x",
        "",
        "</s>",
        " two  blanks ",
    ]
    for text in texts:
        assert built(text).input_ids == loaded(text).input_ids == again(text).input_ids
        assert (
            built.decode(built(text).input_ids, skip_special_tokens=True).strip()
            == text.replace("</s>", "").strip()
        )


def test_user_is_one_piece_more_after_a_space(llm):
    """LLaVA subtracts one token for each later turn, which is only right for such a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(llm)
    assert pieces(tokenizer, "</s>USER:") == ["</s>", "USER", ":"]
    assert pieces(tokenizer, "USER:") == ["▁", "USER", ":"]
    assert tokenizer("USER").input_ids[0] == tokenizer.bos_token_id == 1


def test_every_word_of_the_demo_is_one_piece(llm):
    tokenizer = AutoTokenizer.from_pretrained(llm)
    words = [
        *shapes.SHAPES,
        *shapes.COLOURS,
        *shapes.NUMBERS,
        "top",
        "bottom",
        "left",
        "right",
        "Where",
        "shape",
    ]
    assert [pieces(tokenizer, word) for word in words] == [[f"▁{word}"] for word in words]
    assert "<unk>" not in {piece for text in shapes_models.corpus() for piece in pieces(tokenizer, text)}


@pytest.mark.parametrize(("split", "version"), [("captions", "plain"), ("questions", "v1"), ("test", "v1")])
def test_the_masks_leave_exactly_the_answers(llm, tmp_path, split, version):
    from llava_ext.data.conversation import encode
    from llava_ext.model.folders import load_tokenizer

    spec = ShapesSource(split=split, pictures=30, text_only=4 if split == "questions" else 0)
    shapes.generate(spec, tmp_path)
    tokenizer = load_tokenizer(llm)
    for record in load_json(tmp_path / f"{split}.json"):
        encoded = encode(record, tokenizer, version, 512)
        assert not encoded.mismatch
        answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
        end = "\n" if version == "plain" else "</s>"
        spoken = tokenizer.decode([label for label in encoded.labels if label >= 0])
        assert spoken.replace(" ", "") == "".join(answer + end for answer in answers).replace(" ", "")


def test_the_language_model_is_an_ordinary_folder_with_vicunas_flaw(llm):
    model = AutoModelForCausalLM.from_pretrained(llm)
    assert model.config.hidden_size == 64
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(llm))
    assert load_json(llm / "generation_config.json")["temperature"] == 0.9
    with pytest.raises(ValueError, match="do_sample"):
        GenerationConfig(**load_json(llm / "generation_config.json")).validate(strict=True)


def test_the_tower_is_an_ordinary_folder(tower):
    model, processor = (
        CLIPVisionModel.from_pretrained(tower),
        AutoImageProcessor.from_pretrained(tower, backend="pil"),
    )
    picture = shapes.draw_scene(shapes.random_scene(random.Random(0), False), random.Random(0), 100)
    values = processor(picture, return_tensors="pt").pixel_values
    assert values.shape == (1, 3, 56, 56)
    assert model(values).last_hidden_state.shape == (1, 17, 48)


@pytest.mark.parametrize("spec", [ShapesLlm(seed=3), ShapesTower(seed=3, steps=2, batch_size=8)])
def test_equal_specs_give_equal_weights(tmp_path, spec):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    for name in ("a", "b"):
        shapes_models.build(spec, tmp_path / name)
    digests = {sha256(tmp_path / name / "model.safetensors") for name in ("a", "b")}
    assert len(digests) == 1
    assert torch.equal(torch.get_rng_state(), state), "building a model changed the caller's random state"
    shapes_models.build(spec.model_copy(update={"seed": 4}), tmp_path / "c")
    assert sha256(tmp_path / "c" / "model.safetensors") not in digests


def features(tower, pixels):
    """What LLaVA takes from the tower: the patches of the last layer but one, here averaged."""
    with torch.no_grad():
        return tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].mean(1)


def probe(tower, column):
    """Accuracy of a linear readout of one attribute, on pictures that it was not fitted to."""
    rng = random.Random("probe")
    scenes = [shapes.random_scene(rng, False) for _ in range(900)]
    values = features(tower, shapes_models.scene_pixels(scenes, rng, 56))
    values = torch.cat([(values - values.mean(0)) / values.std(0), torch.ones(len(values), 1)], dim=1)
    wanted = shapes_models.attribute_ids(scenes)[:, column]
    weights = torch.linalg.lstsq(values[:700], torch.nn.functional.one_hot(wanted[:700]).float()).solution
    return (values[700:] @ weights).argmax(-1).eq(wanted[700:]).float().mean().item()


def test_the_tower_has_learned_shapes_and_colours(tower):
    trained = CLIPVisionModel.from_pretrained(tower).eval()
    assert probe(trained, 0) > 0.6  # 4 shapes
    assert probe(trained, 1) > 0.8  # 6 colours
    losses = load_json(tower / "pretraining.json")["loss"]
    assert len(losses) == 100
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_an_unfinished_model_does_not_replace_a_finished_one(tmp_path, monkeypatch):
    spec = ShapesLlm(seed=1)
    shapes_models.build(spec, tmp_path / "llm")
    before = sha256(tmp_path / "llm" / "model.safetensors")
    monkeypatch.setattr(
        shapes_models, "write_json", lambda path, value: (_ for _ in ()).throw(OSError("full disk"))
    )
    with pytest.raises(OSError, match="full disk"):
        shapes_models.build(spec.model_copy(update={"seed": 2}), tmp_path / "llm")
    assert sha256(tmp_path / "llm" / "model.safetensors") == before


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (ShapesLlm, {"hidden_size": 50}, "50 can't be divided into 4 heads"),
        (ShapesTower, {"image_size": 60}, "60 is no multiple of patch_size 14"),
        (ShapesTower, {"heads": 5}, "can't be divided"),
        (ShapesLlm, {"role": "vision_tower"}, "llm"),
    ],
)
def test_impossible_models_say_what_is_wrong(kind, values, words):
    with pytest.raises(ValidationError, match=words):
        kind.model_validate(values)


def test_the_command_line_names_the_kinds(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        shapes_models.main(["--spec", '{"kind": "vicuna"}', "--folder", str(tmp_path / "m")])
    assert "'shapes_llm', 'shapes_tower'" in capsys.readouterr().err
