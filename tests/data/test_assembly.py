"""Batches: cutting, padding, packing, text-only batches, gradients."""

from __future__ import annotations

import pytest
import torch

from llava_ext.data.assembly import Collator
from llava_ext.data.dataset import TrainingCollator
from llava_ext.model.interventions import FLAGS
from tests.support.models import RECORDS, flags, make_batch, make_model, make_samples

ATTENTION = ["eager", "sdpa"]


def gradients(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and all gradients of projector and language model."""
    model.train().zero_grad(set_to_none=True)
    model.model.vision_tower.requires_grad_(False)
    loss = model(**batch).loss
    loss.backward()
    return float(loss.detach()), {
        name: value.grad for name, value in model.named_parameters() if value.grad is not None
    }


def assert_same(one, other, bound: float = 1e-5) -> None:
    assert one[0] == pytest.approx(other[0], abs=bound)
    assert one[1].keys() == other[1].keys()
    worst = max(float((one[1][name] - other[1][name]).abs().max()) for name in one[1])
    assert worst < bound


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(
    "names", [(), ("twoD_vision_embedding", "interleave"), FLAGS], ids=["vanilla", "2D+interleave", "all"]
)
def test_a_packed_row_has_the_loss_and_gradients_of_the_padded_batch(attention, names):
    model, tokenizer, images = make_model(flags(*names), attn_implementation=attention)
    padded = make_batch(model, tokenizer, images)
    packed = make_batch(model, tokenizer, images, packed=True)
    assert packed["input_ids"].shape == (1, int(padded["attention_mask"].sum()))
    assert "attention_mask" not in packed
    assert (packed["position_ids"] == 0).sum() == len(RECORDS)
    assert_same(gradients(model, padded), gradients(model, packed))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("names", [(), ("interleave", "twoD_vision_embedding")])
def test_padding_on_the_right_needs_no_mask(attention, names):
    model, tokenizer, images = make_model(flags(*names), attn_implementation=attention)
    padded = make_batch(model, tokenizer, images)
    assert not padded["attention_mask"].all()
    bare = {name: value for name, value in padded.items() if name != "attention_mask"}
    assert_same(gradients(model, padded), gradients(model, bare))


def test_a_training_batch_says_what_it_holds():
    """Counted on the rows as the model gets them; padding on the left keeps its mask."""
    model, tokenizer, images = make_model()
    samples = [{"index": 7 + number, **item} for number, item in enumerate(make_samples(tokenizer, images))]
    collate = Collator.for_model(model.config, tokenizer)
    plain, batch = collate(samples), TrainingCollator(collate)(samples)
    tokens = int(plain["attention_mask"].sum())
    pictures = int((plain["input_ids"] == model.config.image_token_id).sum())
    assert batch["indices"] == [item["index"] for item in samples] and "attention_mask" not in batch
    assert batch["counts"] == {
        "tokens": tokens,
        "text": tokens - pictures,
        "supervised": int((plain["labels"][:, 1:] != -100).sum()),
        "samples": len(samples),
        "pairs": sum(n * (n + 1) // 2 for n in plain["attention_mask"].sum(1).tolist()),
        "images": len(plain["pixel_values"]),
    }
    left = TrainingCollator(Collator.for_model(model.config, tokenizer, padding_side="left"))(samples)
    assert "attention_mask" in left and left["counts"] == batch["counts"]
    packed = TrainingCollator(Collator.for_model(model.config, tokenizer, packed=True))(samples)
    assert packed["counts"] == batch["counts"]


def test_packed_samples_do_not_see_each_other():
    model, tokenizer, images = make_model()
    records = [RECORDS[1], RECORDS[0]]
    with torch.no_grad():
        one = model(**make_batch(model, tokenizer, images, records, packed=True)).logits
        other = model(**make_batch(model, tokenizer, images, records[:1], packed=True)).logits
    assert torch.allclose(one[:, : other.shape[1]], other, atol=1e-5)


def test_left_padding_gives_the_same_loss():
    model, tokenizer, images = make_model(flags("twoD_vision_embedding"))
    left = make_batch(model, tokenizer, images, padding_side="left")
    assert left["attention_mask"][:, -1].all() and not left["attention_mask"][:, 0].all()
    assert_same(gradients(model, make_batch(model, tokenizer, images)), gradients(model, left))


def test_sequences_are_cut_inside_images_and_coordinates():
    model, tokenizer, images = make_model(flags("interleave"))
    start = make_samples(tokenizer, images)[0]["input_ids"].index(-200)
    whole = make_batch(model, tokenizer, images)
    for limit in range(start, start + 30):
        batch = make_batch(model, tokenizer, images, model_max_length=limit)
        assert torch.equal(batch["input_ids"][0, :limit], whole["input_ids"][0, :limit])
        if "pixel_values" in batch:
            assert int(batch["image_token_counts"].sum()) == int(
                (batch["input_ids"] == model.config.image_token_id).sum()
            )
            assert len(batch["pixel_values"]) == len(batch["image_token_counts"])
        with torch.no_grad():
            model(**batch)
    assert "pixel_values" not in make_batch(model, tokenizer, images, model_max_length=start)


def test_a_cut_image_gives_its_first_tokens():
    model, tokenizer, images = make_model(flags("twoD_vision_embedding"))
    start = make_samples(tokenizer, images)[0]["input_ids"].index(-200)
    limit = start + 9
    with torch.no_grad():
        whole = model(**make_batch(model, tokenizer, images)).logits
        cut = model(**make_batch(model, tokenizer, images, model_max_length=limit)).logits
    assert torch.allclose(cut[0], whole[0, :limit], atol=1e-5)


def test_crops_follow_one_another_in_one_place():
    model, tokenizer, images = make_model()
    sample = make_samples(tokenizer, images)[0]
    crops = torch.stack([sample["images"][0], sample["images"][0].flip(-1)])
    batch = Collator.for_model(model.config, tokenizer)([sample | {"images": [crops]}])
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == 32
    assert torch.equal(batch["pixel_values"], crops)


def test_pad_ids_inside_a_text_are_dropped():
    model, tokenizer, images = make_model()
    sample = make_samples(tokenizer, images, [RECORDS[1]])[0]
    pad = tokenizer.pad_token_id
    holes = {
        key: [pad if key == "input_ids" else -100, *sample[key][:5], pad, *sample[key][5:]]
        for key in ("input_ids", "labels")
    }
    collator = Collator.for_model(model.config, tokenizer)
    assert torch.equal(collator([sample])["input_ids"], collator([sample | holes])["input_ids"])


def test_pictures_that_the_text_does_not_mention_are_ignored():
    model, tokenizer, images = make_model()
    samples = make_samples(tokenizer, images)
    batch = Collator.for_model(model.config, tokenizer)([samples[1] | {"images": samples[0]["images"]}])
    assert "pixel_values" not in batch


def test_pixels_may_come_as_uint8():
    from llava_ext.data.images import ImagePreprocessor
    from tests.support.models import picture

    model, tokenizer, images = make_model()
    batch = make_batch(model, tokenizer, images, [RECORDS[0]])
    raw = ImagePreprocessor.from_processor(images, "pad").uint8(picture(0)).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(
            model(**batch).logits, model(**(batch | {"pixel_values": raw})).logits, atol=1e-5
        )


# -- batches without pictures -----------------------------------------------------------------------------


def module_order(model, batch) -> list[str]:
    """The modules that a forward pass in training runs, in order."""
    seen: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
        for name, module in model.named_modules()
        if not list(module.children()) and "rotary" not in name
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("names", [(), FLAGS], ids=["vanilla", "all flags"])
def test_text_only_batches_run_the_same_modules_and_leave_the_projector_alone(names):
    """Ranks of a distributed training must agree on both; a projector without gradient would hang or crash
    it.
    """
    model, tokenizer, images = make_model(flags(*names))
    model.train()
    with_image = module_order(model, make_batch(model, tokenizer, images, [RECORDS[0]]))
    text_batch = make_batch(model, tokenizer, images, [RECORDS[1]])
    assert module_order(model, text_batch) == with_image
    _, found = gradients(model, text_batch)
    projector = [found[name] for name in found if "projector" in name]
    assert len(projector) == len(list(model.model.multi_modal_projector.parameters()))
    assert all((gradient == 0).all() for gradient in projector)


def test_text_only_inference_does_not_touch_the_tower():
    model, tokenizer, images = make_model()
    order = module_order(model.eval(), make_batch(model, tokenizer, images, [RECORDS[1]]))
    assert not any("vision_tower" in name or "projector" in name for name in order)


def test_a_frozen_tower_keeps_no_graph_and_an_open_one_learns():
    model, tokenizer, images = make_model()
    batch = make_batch(model, tokenizer, images)
    model.train().model.vision_tower.requires_grad_(False)
    model(**batch).loss.backward()
    assert all(value.grad is None for value in model.model.vision_tower.parameters())
    model.model.vision_tower.requires_grad_(True)
    model(**batch).loss.backward()
    assert model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model, tokenizer, images = make_model(flags(*FLAGS))
    batch = make_batch(model, tokenizer, images)
    plain = gradients(model, batch)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(plain, gradients(model, batch), 1e-6)
