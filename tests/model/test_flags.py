"""Every flag reaches the model: its output changes, as described, alone and together with every other
flag.
"""

from __future__ import annotations

import itertools
import json
from functools import cache

import pytest
import torch

from llava_ext.data.assembly import AssemblyError, Collator, image_block
from llava_ext.model.build import mean_token_norm
from llava_ext.model.configuration_spatial_llava import SpatialLlavaConfig
from llava_ext.model.folders import BuildError
from llava_ext.model.interventions import FIELD_NAMES, FLAGS, InterventionError, Interventions
from tests.support.models import RECORDS, flags, make_batch, make_model, make_samples


@cache
def outcome(names: tuple[str, ...]) -> tuple[float, torch.Tensor]:
    """Loss over the test's records, and the vision tokens of one picture."""
    model, tokenizer, images = make_model(flags(*names))
    batch = make_batch(model, tokenizer, images)
    with torch.no_grad():
        tokens = model.get_image_features(batch["pixel_values"]).pooler_output
        return float(model(**batch).loss), torch.stack(tokens)


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_changes_the_output(name):
    assert abs(outcome((name,))[0] - outcome(())[0]) > 1e-4


@pytest.mark.parametrize("pair", itertools.combinations(FLAGS, 2), ids="+".join)
def test_each_pair_works_and_differs_from_either_alone(pair):
    loss = outcome(pair)[0]
    assert loss == loss
    for name in pair:
        assert abs(loss - outcome((name,))[0]) > 1e-5, f"{pair} equals {name} alone"


def test_all_flags_together_train():
    model, tokenizer, images = make_model(flags(*FLAGS))
    model.train()
    batch = make_batch(model, tokenizer, images)
    model(**batch).loss.backward()
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_is_saved_in_the_configuration(name, tmp_path):
    config = make_model(flags(name))[0].config
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.keys() & set(FIELD_NAMES) == {field for field in FIELD_NAMES if field != "pooling"}
    stored = SpatialLlavaConfig.from_pretrained(tmp_path)
    assert stored.interventions == config.interventions
    assert getattr(stored, name) is True


# -- each flag's meaning ----------------------------------------------------------------------------------


def test_normalised_tokens_have_the_mean_norm_of_text_tokens():
    model, tokenizer, _ = make_model(flags("normalize_projector"))
    wanted = mean_token_norm(model.get_input_embeddings(), len(tokenizer))
    norms = outcome(("normalize_projector",))[1].norm(dim=-1)
    assert torch.allclose(norms, torch.full_like(norms, wanted), rtol=1e-4)
    assert model.config.projector_max_norm * model.config.projector_scale == pytest.approx(wanted)


def test_published_statistics_are_the_default():
    model, tokenizer, images = make_model(Interventions(normalize_projector=True))
    assert (model.config.projector_max_norm, model.config.projector_scale) == (1.22, 0.83)
    tokens = model.get_image_features(make_batch(model, tokenizer, images)["pixel_values"]).pooler_output
    assert float(torch.stack(tokens).detach().norm(dim=-1).max()) == pytest.approx(1.22 * 0.83, rel=1e-4)


def test_compression_averages_blocks_of_the_grid():
    plain, pooled = outcome(())[1], outcome(("compression_after_projection",))[1]
    grid = plain.view(len(plain), 2, 2, 2, 2, -1)  # image, block row, row, block column, column, channel
    assert torch.allclose(pooled.view(len(plain), 2, 2, -1), grid.mean(dim=(2, 4)), atol=1e-6)


def test_compression_to_the_whole_grid_changes_nothing():
    model, tokenizer, images = make_model(
        Interventions(compression_after_projection=True, final_spatial_size=16)
    )
    with torch.no_grad():
        loss = float(model(**make_batch(model, tokenizer, images)).loss)
    assert loss == outcome(())[0]


def test_layer_picks_matter_in_number_and_order():
    def loss(layers):
        model, tokenizer, images = make_model(
            Interventions(use_multilayer_features=True, multilayer_layers=layers)
        )
        assert model.model.multi_modal_projector.linear_1.in_features == 32 * len(layers)
        with torch.no_grad():
            return float(model(**make_batch(model, tokenizer, images)).loss)

    assert len({loss((4, 8)), loss((8, 4)), loss((4, 12)), loss((4, 8, 12))}) == 4


@pytest.mark.parametrize(("sparsity", "count"), [(1, 16), (2, 8), (3, 5), (4, 4), (16, 1)])
def test_interleave_follows_sparsity_and_the_true_grid(sparsity, count):
    model, tokenizer, _ = make_model(Interventions(interleave=True, interleave_sparsity=sparsity))
    block = image_block(model.config.image_token_id, model.config, tokenizer)
    assert block.count(model.config.image_token_id) == 16
    texts, text = [], []
    for token in [*block, model.config.image_token_id]:
        if token != model.config.image_token_id:
            text.append(token)
        elif text:
            texts.append("".join(tokenizer.convert_ids_to_tokens(text)))
            text = []
    wanted = [f"{index // 4},{index % 4}" for index in range(16) if (index + 1) % sparsity == 0]
    assert texts == wanted
    assert len(texts) == count


def test_coordinates_reach_the_projector_with_compression_and_several_layers():
    model, tokenizer, images = make_model(
        flags("add_spatial_coordinates", "compression_after_projection", "use_multilayer_features")
    )
    model(**make_batch(model, tokenizer, images)).loss.backward()
    first = model.model.multi_modal_projector.linear_1
    assert first.in_features == 3 * 32 + 2
    assert (first.weight.grad[:, -2:].abs().sum(0) > 0).all()


def test_coordinates_run_from_minus_one_to_one():
    from llava_ext.model.modeling_spatial_llava import patch_coordinates

    x, y = patch_coordinates(torch.zeros(2, 16, 5))[1].unbind(-1)
    assert x[:4].tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1])
    assert y[::4].tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1])
    assert x[12:].tolist() == x[:4].tolist() and len(set(y[:4].tolist())) == 1


# -- positions in two dimensions --------------------------------------------------------------------------


def rotary_table(model, batch):
    """cos and sin as the LLM's layers get them."""
    seen = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0]


def test_grid_positions_are_rotations_by_row_and_column_per_sample():
    model, tokenizer, images = make_model(flags("twoD_vision_embedding"))
    batch = make_batch(model, tokenizer, images)
    cos, sin = rotary_table(model, batch)
    half = cos.shape[-1] // 2
    assert torch.equal(cos[..., :half], cos[..., half:]) and torch.equal(sin[..., :half], sin[..., half:])
    frequencies = model.model.language_model.rotary_emb.inv_freq
    is_image = batch["input_ids"] == model.config.image_token_id
    for row in (0, 2):
        places = is_image[row].nonzero().squeeze(-1)
        start = int(places[0])
        for index, place in enumerate(places.tolist()):
            pair = torch.tensor([start + index // 4, start + index % 4], dtype=torch.float32)
            angle = frequencies * pair.repeat(
                half // 2
            )  # even frequencies turn by the row, odd ones by the column
            assert torch.allclose(cos[row, place, :half], angle.cos(), atol=1e-5)
            assert torch.allclose(sin[row, place, :half], angle.sin(), atol=1e-5)


def test_text_keeps_its_positions():
    model, tokenizer, images = make_model(flags("twoD_vision_embedding"))
    plain, _, _ = make_model()
    plain.model.multi_modal_projector.load_state_dict(model.model.multi_modal_projector.state_dict())
    text_only = make_batch(model, tokenizer, images, [RECORDS[1]])
    with torch.no_grad():
        assert torch.equal(model(**text_only).logits, plain(**text_only).logits)
    batch = make_batch(model, tokenizer, images)
    ours, theirs = rotary_table(model, batch)[0], rotary_table(plain, batch)[0]
    text = batch["input_ids"] != model.config.image_token_id
    assert torch.equal(ours[text], theirs.expand(ours.shape)[text])


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_sample_does_not_depend_on_its_neighbours(side):
    """The published table is shared by the batch; ours is not, so a batch equals its samples one by one."""
    model, tokenizer, images = make_model(flags("twoD_vision_embedding", "interleave"))
    batch = make_batch(model, tokenizer, images, padding_side=side)
    with torch.no_grad():
        together = model(**batch).logits
        for row, record in enumerate(RECORDS):
            samples = make_samples(tokenizer, images)
            alone = model(**Collator.for_model(model.config, tokenizer)([samples[row]])).logits[0]
            assert record["id"] == samples[row]["id"]
            assert torch.allclose(together[row][batch["attention_mask"][row]], alone, atol=2e-5)


def test_two_images_of_a_sample_are_counted_each_on_its_own():
    model, tokenizer, images = make_model(flags("twoD_vision_embedding"))
    one = make_samples(tokenizer, images)[0]
    twice = {key: [*one[key], *one[key]] for key in ("input_ids", "labels", "images")}
    batch = Collator.for_model(model.config, tokenizer)([twice])
    cos, _ = rotary_table(model, batch)
    places = (batch["input_ids"][0] == model.config.image_token_id).nonzero().squeeze(-1)
    first, second = cos[0, places[:16]], cos[0, places[16:]]
    assert not torch.equal(first, second)
    # Row 0, column 0 of the second image: the ordinary position of its first token.
    frequencies = model.model.language_model.rotary_emb.inv_freq
    assert torch.allclose(second[0, : len(frequencies)], (frequencies * int(places[16])).cos(), atol=1e-5)


def test_the_published_table_refuses_what_the_published_code_refuses():
    model, tokenizer, images = make_model(flags("twoD_vision_embedding", published_behaviour=True))
    one = make_samples(tokenizer, images)[0]
    far = {
        key: [*one[key], *([5] * 600 if key != "images" else []), *one[key]]
        for key in ("input_ids", "labels", "images")
    }
    with pytest.raises(ValueError, match="575"):
        model(**Collator.for_model(model.config, tokenizer)([far]))


# -- refusals ---------------------------------------------------------------------------------------------


def test_a_tower_that_is_too_small_is_refused_before_the_language_model_is_read(tmp_path):
    with pytest.raises(InterventionError, match="1 to 24"):
        make_model(Interventions(use_multilayer_features=True, multilayer_layers=(30,)))
    with pytest.raises(InterventionError, match="3 does not divide the vision tower's grid side 4"):
        make_model(Interventions(compression_after_projection=True, final_spatial_size=9))


def test_placeholders_without_pixels_are_an_error():
    model, tokenizer, images = make_model()
    batch = make_batch(model, tokenizer, images)
    for training in (False, True):
        model.train(training)
        with pytest.raises(ValueError, match="no pixel_values were given"):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def test_wrong_numbers_of_placeholders_are_an_error():
    model, tokenizer, images = make_model()
    batch = make_batch(model, tokenizer, images)
    with pytest.raises(ValueError, match="32 placeholders in input_ids, 16 vision tokens"):
        model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"][:1])
    with pytest.raises(ValueError, match="image_token_counts"):
        model(**(batch | {"image_token_counts": torch.tensor([16, 17])}))


def test_more_placeholders_than_images_name_the_sample():
    model, tokenizer, images = make_model()
    sample = make_samples(tokenizer, images)[0]
    with pytest.raises(AssemblyError, match="'one': 2 image placeholders but 1 images"):
        Collator.for_model(model.config, tokenizer)(
            [sample | {"input_ids": [*sample["input_ids"], -200], "labels": [*sample["labels"], -200]}]
        )


def test_folders_of_the_wrong_kind_are_named(tmp_path):
    from llava_ext.checkpoints.stored import load_model
    from llava_ext.model.parts import load_tower
    from tests.support.models import LLM

    with pytest.raises(BuildError, match=r"found a llama model as the vision tower; .*CLIP"):
        load_tower(LLM, torch.float32, None)
    with pytest.raises(BuildError, match="a checkpoint folder is expected"):
        load_model(tmp_path)
