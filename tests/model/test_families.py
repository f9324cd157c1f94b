"""The registers: every vision tower with every intervention, every language model's padding, and what is
refused.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava_ext.checkpoints.original import export_original, loads_with, unknown_to_llava
from llava_ext.checkpoints.stored import load_model, save_checkpoint
from llava_ext.data.images import ImageError, ImagePreprocessor
from llava_ext.errors import TrainingError
from llava_ext.model.build import build_model
from llava_ext.model.folders import (
    BuildError,
    image_config,
    load_image_processor,
    load_tokenizer,
    picture_fields,
    tower_config,
)
from llava_ext.model.interventions import InterventionError, Interventions
from llava_ext.model.language_models import GENERAL, LANGUAGE_MODELS, padding_token, turn_end_ids
from llava_ext.model.modeling_spatial_llava import patch_coordinates
from llava_ext.model.parts import check_language_model, load_llm
from llava_ext.model.projectors import projector_depth
from llava_ext.model.towers import TOWERS, TowerError
from tests.support.families import byte_tokenizer, llama3_tokenizer, make_llm, make_tower, qwen_tokenizer
from tests.support.models import LLM, make_batch, picture
from workflow_scripts.config.models import PathModel

# What stands before the patches, and the norm after the last layer, said once more by hand.
BEFORE = {"clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1, "dinov2_with_registers": 5}
NORMS = {"clip_vision_model": "post_layernorm", "siglip_vision_model": "post_layernorm"}
LAYERS = (1, 3, 4)  # of the tiny towers' four


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One tiny folder of every registered tower, and a Qwen."""
    root = tmp_path_factory.mktemp("families")
    made = {kind: make_tower(root / kind, kind) for kind in TOWERS}
    return made | {"qwen2": make_llm(root / "qwen2", "qwen2", qwen_tokenizer())}


def build(folders, kind, interventions=None, llm=LLM, **options):
    torch.manual_seed(5)
    model, tokenizer, processor = build_model(llm, folders[kind], interventions, **options)
    return model.eval(), tokenizer, processor


def layers_by_hand(tower, pixels):
    """The output of every layer, 0 is the embeddings': each layer is called here."""
    hidden = tower.embeddings(pixels)
    hidden = tower.pre_layrnorm(hidden) if hasattr(tower, "pre_layrnorm") else hidden
    found = [hidden]
    for layer in getattr(tower.encoder, "layers", None) or tower.encoder.layer:
        output = layer(found[-1], None)
        found.append(output if isinstance(output, torch.Tensor) else output[0])
    return found


def tokens_of(model, pixels):
    return torch.stack(model.model.get_image_features(pixels).pooler_output)


# ---- vision towers --------------------------------------------------------------------------------------

each_tower = pytest.mark.parametrize("kind", list(TOWERS))


def test_the_tests_cover_the_register():
    assert TOWERS.keys() == BEFORE.keys()


@each_tower
def test_vanilla_drops_what_stands_before_the_patches_and_nothing_else(folders, kind):
    model, _, processor = build(folders, kind)
    pixels = ImagePreprocessor.from_processor(processor)(picture(1))[None]
    with torch.no_grad():
        patches = layers_by_hand(model.model.vision_tower, pixels)[-2][:, BEFORE[kind] :]
        wanted = model.model.multi_modal_projector(patches)
        assert wanted.shape[1] == model.config.tokens_per_image == 16
        assert torch.equal(tokens_of(model, pixels), wanted)


@each_tower
def test_several_layers_pass_the_towers_own_closing_norm(folders, kind):
    chosen = Interventions(use_multilayer_features=True, multilayer_layers=LAYERS)
    model, _, processor = build(folders, kind, chosen)
    tower = model.model.vision_tower
    pixels = ImagePreprocessor.from_processor(processor)(picture(1))[None]
    with torch.no_grad():
        states = layers_by_hand(tower, pixels)
        norm = getattr(tower, NORMS.get(kind, "layernorm"))
        features = torch.cat([norm(states[layer])[:, BEFORE[kind] :] for layer in LAYERS], dim=-1)
        assert torch.equal(tokens_of(model, pixels), model.model.multi_modal_projector(features))
        if kind != "clip_vision_model":  # CLIP's own last state is before its norm
            assert torch.allclose(norm(states[4]), tower(pixels).last_hidden_state, atol=1e-6)


@each_tower
def test_coordinates_and_pooling_see_the_patches_alone(folders, kind):
    chosen = Interventions(
        add_spatial_coordinates=True, compression_after_projection=True, final_spatial_size=4
    )
    model, _, processor = build(folders, kind, chosen)
    pixels = ImagePreprocessor.from_processor(processor)(picture(1))[None]
    with torch.no_grad():
        patches = layers_by_hand(model.model.vision_tower, pixels)[-2][:, BEFORE[kind] :]
        with_places = torch.cat([patches, patch_coordinates(patches)], dim=-1)
        projector = model.model.multi_modal_projector
        hidden = projector.linear_2(projector.act(projector.linear_1(with_places)))
        grid = hidden.view(1, 2, 2, 2, 2, -1).mean((2, 4)).view(1, 4, -1)
        assert torch.allclose(tokens_of(model, pixels), grid, atol=1e-6)


@each_tower
@pytest.mark.parametrize("flag", ["twoD_vision_embedding", "interleave"])
def test_positions_and_coordinates_in_the_text_work_with_every_tower(folders, kind, flag):
    vanilla, _, _ = build(folders, kind)
    model, tokenizer, processor = build(folders, kind, Interventions(**{flag: True}))
    with torch.no_grad():
        batch = make_batch(model, tokenizer, processor)
        logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}).logits
        assert torch.isfinite(logits).all()
        if flag == "twoD_vision_embedding":
            plain = vanilla(**{key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")})
            assert not torch.allclose(logits, plain.logits)


@each_tower
def test_cls_patch_keeps_all_that_stands_before_the_patches_or_is_refused(folders, kind):
    if not BEFORE[kind]:
        with pytest.raises(TowerError, match=r"cls_patch, but a SigLIP .* has no class token .*use patch"):
            build(folders, kind, vision_feature_select_strategy="full")
        return
    model, _, processor = build(folders, kind, vision_feature_select_strategy="full")
    pixels = ImagePreprocessor.from_processor(processor)(picture(1))[None]
    with torch.no_grad():
        assert tokens_of(model, pixels).shape[1] == model.config.tokens_per_image == 16 + BEFORE[kind]


def test_a_grid_of_27_refuses_16_tokens_with_the_divisors_that_exist(tmp_path):
    """SigLIP-so400m/384: 384 pixels are 27 patches of 14 and a rest that no patch takes."""
    processor = {"size": {"height": 384, "width": 384}}
    folders = {"siglip_vision_model": make_tower(tmp_path, "siglip_vision_model", processor, image_size=384)}
    sixteen = Interventions(compression_after_projection=True, final_spatial_size=16)
    with pytest.raises(InterventionError, match=r"does not divide .* grid side 27; use one of 1, 9, 81, 729"):
        build(folders, "siglip_vision_model", sixteen)
    nine = Interventions(compression_after_projection=True, final_spatial_size=9)
    model, _, _ = build(folders, "siglip_vision_model", nine)
    assert (model.config.grid_side, model.config.tokens_per_image) == (27, 9)


def test_a_tower_that_is_not_registered_is_refused_with_the_list(tmp_path):
    from transformers import Siglip2VisionConfig

    Siglip2VisionConfig().save_pretrained(tmp_path)  # NaFlex: patches of any number, so no grid
    with pytest.raises(BuildError, match=r"siglip2_vision_model .* expected: CLIP .*DINOv2 with registers"):
        load_image_processor(tmp_path)


def test_dinov2_takes_the_size_of_its_processor_and_clip_only_its_own(tmp_path):
    larger = {"size": {"shortest_edge": 80}, "crop_size": {"height": 70, "width": 70}}
    folders = {kind: make_tower(tmp_path / kind, kind, larger) for kind in ("dinov2", "clip_vision_model")}
    model, _, processor = build(folders, "dinov2")
    pixels = ImagePreprocessor.from_processor(processor)(picture(1))[None]
    assert (model.config.image_side, model.config.tokens_per_image) == (70, 25)
    with torch.no_grad():
        assert tokens_of(model, pixels).shape[1] == 25
    folders["clip_vision_model"] = make_tower(
        tmp_path / "c", "clip_vision_model", {**larger, "size": {"shortest_edge": 70}}
    )
    with pytest.raises(TowerError, match="gives 70 pixels a side, the CLIP tower takes 56"):
        build(folders, "clip_vision_model")
    odd = {"size": {"shortest_edge": 60}, "crop_size": {"height": 60, "width": 60}}
    folders["dinov2"] = make_tower(tmp_path / "odd", "dinov2", odd)
    with pytest.raises(TowerError, match=r"no multiple of the DINOv2 tower's patches of 14; .* to 56"):
        build(folders, "dinov2")


@each_tower
@pytest.mark.parametrize("shape", [(90, 61), (37, 110), (56, 56)])
def test_square_gives_the_pixels_of_the_towers_own_processor(folders, kind, shape):
    processor = load_image_processor(folders[kind])
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    mine = ImagePreprocessor.from_processor(processor, "square")(Image.fromarray(noise))
    theirs = processor(Image.fromarray(noise), return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(mine, theirs, atol=1e-5)


@each_tower
def test_statistics_are_measured_on_any_language_model(folders, kind):
    chosen = Interventions(normalize_projector=True, normalize_statistics="auto")
    model, tokenizer, processor = build(folders, kind, chosen, llm=folders["qwen2"])
    norms = model.get_input_embeddings().weight[: len(tokenizer)].norm(dim=-1)
    mean = norms[norms > 0].mean()  # the padding's row is zero
    pixels = ImagePreprocessor.from_processor(processor)(picture(1))[None]
    with torch.no_grad():
        assert torch.allclose(tokens_of(model, pixels).norm(dim=-1), mean, atol=1e-4)


def test_projectors_are_named_as_in_llava():
    assert [projector_depth(name) for name in ("linear", "mlp2x_gelu", "mlp12x_gelu")] == [1, 2, 12]
    with pytest.raises(ValueError, match="found 'resampler'; allowed are `linear` and `mlpNx_gelu`"):
        projector_depth("resampler")


def test_the_workflow_refuses_a_tower_when_it_is_prepared_and_when_the_config_is_read(folders, tmp_path):
    from transformers import Siglip2VisionConfig

    from workflow_scripts.config.checks import tower_facts
    from workflow_scripts.io import UserError
    from workflow_scripts.prepare_model.step import preflight

    Siglip2VisionConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"models.naflex: .*siglip2_vision_model .* expected: CLIP"):
        preflight(tmp_path, "vision_tower", "naflex")
    preflight(folders["siglip_vision_model"], "vision_tower", "siglip")
    preflight(folders["qwen2"], "llm", "qwen")
    larger = {"size": {"shortest_edge": 80}, "crop_size": {"height": 70, "width": 70}}
    dino = make_tower(tmp_path / "dino", "dinov2", larger)
    model = PathModel(kind="path", role="vision_tower", path=str(dino))
    assert tower_facts(SimpleNamespace(models={"dino": model}), "dino") == {"side": 5, "layers": 4}


# ---- checkpoints ----------------------------------------------------------------------------------------


@each_tower
@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
def test_a_vanilla_checkpoint_is_stock_llava_with_the_right_number_of_tokens(
    folders, kind, aspect_ratio, tmp_path
):
    """No code of ours: logits, pixels and placeholders equal training's. Registers are more than stock can
    drop.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, tokenizer, processor = build(folders, kind, llm=folders["qwen2"])
    save_checkpoint(model, tokenizer, processor, tmp_path, "v1", aspect_ratio)
    if kind == "dinov2_with_registers":
        assert (tmp_path / "towers.py").is_file() and not model.config.is_stock
        return
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    images = AutoProcessor.from_pretrained(tmp_path)
    batch = images(text="<image>a red circle", images=picture(3), return_tensors="pt")
    pixels = ImagePreprocessor.from_processor(processor, aspect_ratio)(picture(3))[None]
    assert torch.allclose(batch["pixel_values"], pixels, atol=1e-5)
    assert int((batch["input_ids"] == stock.config.image_token_id).sum()) == 16
    again, _, stored = load_model(tmp_path)
    assert torch.equal(ImagePreprocessor.from_processor(stored)(picture(3))[None], pixels)
    with torch.no_grad():
        mine = again(**batch).logits  # without the rows that were added for `<image>`
        assert torch.allclose(stock(**batch).logits[..., : mine.shape[-1]], mine, atol=1e-5)
        wanted = model.model.get_image_features(pixels).pooler_output[0]
        assert torch.allclose(
            stock.get_image_features(batch["pixel_values"]).pooler_output[0], wanted, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_tied_embeddings_stay_tied_in_checkpoints_and_on_the_way_back(folders, tmp_path, kind):
    from transformers import LlavaForConditionalGeneration

    tied = make_llm(tmp_path / "llm", kind, qwen_tokenizer(), tie_word_embeddings=True)
    model, tokenizer, processor = build(folders, "siglip_vision_model", llm=tied)
    rows = model.config.text_config.vocab_size
    save_checkpoint(model, tokenizer, processor, tmp_path / "hf", "plain", "pad")
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    table, head = stock.get_input_embeddings().weight, stock.get_output_embeddings().weight
    assert table.data_ptr() == head.data_ptr() and len(table) > rows
    assert torch.equal(table[:rows], model.get_input_embeddings().weight)
    again, _, _ = load_model(tmp_path / "hf")
    table, head = again.get_input_embeddings().weight, again.get_output_embeddings().weight
    assert table.data_ptr() == head.data_ptr() and torch.equal(table, model.get_input_embeddings().weight)


def test_the_original_layout_refuses_families_that_llava_does_not_know(folders, tmp_path):
    model, tokenizer, _ = build(folders, "siglip_vision_model", llm=folders["qwen2"])
    with pytest.raises(
        TrainingError, match=r"no SigLIP .* tower, only CLIP; .* no qwen2 language model, only Llama"
    ):
        export_original(model, tokenizer, tmp_path / "whole", {"mm_vision_tower": "x"})
    assert unknown_to_llava("mistral", "clip_vision_model") == []
    assert loads_with(Interventions(), "qwen2", "dinov2") == ["llava_ext"]
    assert loads_with(Interventions(), "llama", "clip_vision_model") == ["LLaVA", "llava_ext"]


def test_a_stage_1_projector_of_any_family_comes_back_with_its_parts(folders, tmp_path):
    model, tokenizer, _ = build(folders, "dinov2", llm=folders["qwen2"])
    settings = {"mm_vision_tower": str(folders["dinov2"]), "mm_projector_type": "mlp2x_gelu"}
    export_original(model, tokenizer, tmp_path / "stage1", settings, projector_only=True)
    again, _, _ = load_model(tmp_path / "stage1", llm=folders["qwen2"])
    for name, weight in model.model.multi_modal_projector.named_parameters():
        assert torch.equal(weight, again.model.multi_modal_projector.get_parameter(name))


# ---- language models ------------------------------------------------------------------------------------


def test_qwens_padding_is_its_own_and_what_ends_a_turn_never_pads(tmp_path):
    make_llm(tmp_path, "qwen2", qwen_tokenizer())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token == "<|endoftext|>"
    ends = turn_end_ids(tokenizer, LANGUAGE_MODELS["qwen2"])
    assert ends == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_a_base_model_that_pads_with_its_end_token_gets_another_of_its_family(tmp_path):
    base = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    make_llm(tmp_path / "qwen2.5", "qwen2", byte_tokenizer(("<|endoftext|>", "<|fim_pad|>"), None, **base))
    assert load_tokenizer(tmp_path / "qwen2.5").pad_token == "<|fim_pad|>"
    make_llm(tmp_path / "qwen2", "qwen2", byte_tokenizer(("<|endoftext|>",), None, **base))
    with pytest.raises(
        BuildError, match=r"has no <unk>.*set pad_token in tokenizer_config.json.*<\|fim_pad\|>"
    ):
        load_tokenizer(tmp_path / "qwen2")


def test_llama_3_has_no_padding_token_and_gets_the_reserved_one(tmp_path):
    make_llm(tmp_path, "llama", llama3_tokenizer())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"
    assert tokenizer.pad_token_id not in turn_end_ids(tokenizer, LANGUAGE_MODELS["llama"])


def test_vicunas_padding_stays_unk():
    assert load_tokenizer(LLM).pad_token == "<unk>"


def test_another_decoder_pads_with_its_own_token_if_it_ends_nothing():
    named = {"eos_token": "<end>", "pad_token": "<end>"}
    assert padding_token(byte_tokenizer(("<end>",), None, **named), GENERAL) is None
    assert padding_token(byte_tokenizer(("<end>", "<pad>"), None, **named), GENERAL) == "<pad>"


@pytest.mark.parametrize("kind", ["olmo2", "smollm3"])
def test_an_unlisted_plain_decoder_is_taken_through_the_general_entry(tmp_path, kind):
    make_llm(tmp_path, kind, qwen_tokenizer())
    assert kind not in LANGUAGE_MODELS
    assert load_llm(tmp_path, torch.float32, None).config.model_type == kind


@pytest.mark.parametrize(
    ("kind", "lacks"),
    [
        ("gemma", "a plain embedding table"),
        ("gpt2", "decoder layers named `layers`"),
        ("granite", "logits_scaling"),
    ],
)
def test_a_language_model_of_another_build_is_refused_before_its_weights_are_read(tmp_path, kind, lacks):
    from transformers import CONFIG_MAPPING

    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)  # no weights at all
    with pytest.raises(BuildError, match=f"found a {kind} model, which lacks .*{lacks}.*Qwen 2 and 2.5"):
        check_language_model(tmp_path)


def test_a_vision_model_is_no_language_model(tmp_path):
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(BuildError, match="found a vit model, which lacks a transformers class for causal"):
        load_llm(tmp_path, torch.float32, None)


def test_the_workflow_exports_only_the_hf_layout_where_llava_knows_no_such_family(folders, tmp_path, capsys):
    from llava_ext.files import sha256
    from workflow_scripts.export.step import export
    from workflow_scripts.io import write_json

    model, tokenizer, processor = build(folders, "siglip_vision_model", llm=folders["qwen2"])
    save_checkpoint(model, tokenizer, processor, tmp_path / "run" / "state", "plain", "pad")
    files = {path.name: sha256(path) for path in (tmp_path / "run" / "state").iterdir()}
    write_json(tmp_path / "run" / "state" / "provenance.json", {})
    trained = {"stage": "finetune", "run": "r", "folder": "state", "digest": "0123456789ab", "files": files}
    write_json(tmp_path / "run" / "manifest.json", trained)
    spec = {"vision_tower": "siglip", "interventions": {}}
    result = export(spec, tmp_path / "run" / "manifest.json", tmp_path / "export" / "manifest.json")
    assert list(result["folders"]) == list(result["loads_with"]) == ["hf"]
    assert "LlavaForConditionalGeneration" in result["loads_with"]["hf"][0]
    assert "LLaVA's code has no qwen2 language model" in capsys.readouterr().out


@pytest.mark.parametrize("tokenizer_of", [qwen_tokenizer, llama3_tokenizer])
def test_interleaved_coordinates_are_the_same_ids_in_training_and_in_the_saved_processor(
    folders, tmp_path, tokenizer_of
):
    """Byte-level tokenizers have no word mark that would have to be taken off."""
    from llava_ext.checkpoints.stored import make_processor
    from llava_ext.data.assembly import Collator

    llm = make_llm(tmp_path / "llm", "qwen2", tokenizer_of())
    chosen = Interventions(interleave=True, interleave_sparsity=3)
    model, tokenizer, processor = build(folders, "siglip_vision_model", chosen, llm=llm)
    saved = make_processor(model.config, tokenizer, processor)
    theirs = saved(text="<image>", images=picture(3), add_special_tokens=False)["input_ids"][0]
    sample = {"id": "a", "input_ids": [-200], "labels": [-100], "images": [torch.zeros(3, 56, 56)]}
    mine = Collator.for_model(model.config, tokenizer)([sample])["input_ids"][0].tolist()
    assert list(theirs) == mine and len(mine) > 16


PICTURES = {"size": {"height": 56, "width": 56}, "do_center_crop": False, "resample": 2}
TURNED = PICTURES | {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


@each_tower
@pytest.mark.parametrize(
    "settings",
    [
        {},
        TURNED,
        TURNED | {"do_center_crop": True, "crop_size": {"height": 56, "width": 56}},
        TURNED | {"do_center_crop": True, "size": 56, "crop_size": 56},
    ],
    ids=["as saved", "other numbers", "with a crop", "one number a size"],
)
def test_pictures_are_told_by_the_settings_as_by_transformers_image_processor(
    folders, tmp_path, kind, settings
):
    folder = make_tower(tmp_path / "tower", kind, settings)
    by_class = picture_fields(tower_config(folder), load_image_processor(folder))
    stated = image_config(folder, Interventions(), keeps_all=False)
    assert {name: getattr(stated, name) for name in by_class} == by_class


@each_tower
@pytest.mark.parametrize("name", ["size", "image_mean", "image_std", "resample", "crop_size"])
def test_a_setting_that_is_null_is_named(tmp_path, kind, name):
    settings = TURNED | {"do_center_crop": True, "crop_size": {"height": 56, "width": 56}, name: None}
    folder = make_tower(tmp_path / "tower", kind, settings)
    with pytest.raises(ImageError, match=f"does not say {name}; preprocessor_config.json has to"):
        image_config(folder, Interventions(), keeps_all=False)


def test_a_processors_file_comes_before_the_image_processors(folders, tmp_path):
    folder = make_tower(tmp_path / "tower", "clip_vision_model", TURNED)
    within = {"image_processor": TURNED | {"image_mean": [0.7, 0.7, 0.7]}}
    (folder / "processor_config.json").write_text(json.dumps(within))
    stated = image_config(folder, Interventions(), keeps_all=False)
    assert stated.image_mean == list(load_image_processor(folder).image_mean) == [0.7, 0.7, 0.7]


SHORT = """
import sys
from llava_ext.model.folders import image_config, load_tokenizer
from llava_ext.model.interventions import Interventions
load_tokenizer(sys.argv[1]), image_config(sys.argv[2], Interventions(), keeps_all=False)
print([name for name in sys.modules if name == "transformers.modeling_utils" or ".modeling_clip" in name])
"""


def test_the_survey_of_a_folder_that_says_all_loads_no_models_code(tmp_path):
    settings = TURNED | {"do_center_crop": True, "crop_size": {"height": 56, "width": 56}}
    folder = make_tower(tmp_path / "tower", "clip_vision_model", settings)
    command = [sys.executable, "-c", SHORT, str(LLM), str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
