"""The streamed measures against a direct computation in float64 with eager attention."""

from functools import cache

import pytest
import torch

from llava_ext.analysis.diagnostics import permuted_vision_tokens
from llava_ext.analysis.measures import BY_HEAD, BY_LAYER, measure
from tests.support.models import RECORDS, flags, make_batch, make_model

PICTURES = [RECORDS[0], RECORDS[2]]
TWO_D = ("normalize_projector", "twoD_vision_embedding", "interleave")
VARIANTS = [(), TWO_D, ("compression_after_projection", "twoD_vision_embedding")]


@cache
def built(names, **more):
    model, tokenizer, images = make_model(flags(*names, **more))
    return model.double(), tokenizer, images


def prepared(names=(), side="left", **more):
    model, tokenizer, images = built(names, **more)
    batch = make_batch(model, tokenizer, images, PICTURES, padding_side=side)
    batch = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    return model, batch | {"pixel_values": batch["pixel_values"].double()}


def shuffled(model):
    return lambda number: permuted_vision_tokens(model, seed=number)


def table(rows):
    return {(row.measure, row.layer, row.head): row.value for row in rows}


def row_of(batch, index):
    """One prompt without its padding."""
    real = batch["attention_mask"][index].bool()
    ids = batch["input_ids"][index][real][None]
    pixels = batch["pixel_values"][index][None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def eager(model, inputs):
    """All that eager attention gives, and each attention layer's input and rotary tables."""
    kept = model.config._attn_implementation
    model.set_attn_implementation("eager")
    seen, handles = [], []
    for layer in model.model.language_model.layers:
        handles.append(
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, given: seen.append(
                    (given["hidden_states"], given["position_embeddings"])
                ),
                with_kwargs=True,
            )
        )
    raw = [None]
    handles.append(layer.register_forward_hook(lambda module, args, output: raw.__setitem__(0, output)))
    with torch.no_grad():
        output = model(**inputs, output_attentions=True, output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    model.set_attn_implementation(kept)
    return output, [*output.hidden_states[:-1], raw[0]], seen


def complex_heads(projected, tables, head_dim):
    """Heads as complex numbers, (heads, tokens, pairs), turned by their positions."""
    cos, sin = (item[0].double() for item in tables)
    heads = projected[0].view(len(projected[0]), -1, head_dim).transpose(0, 1)
    half = head_dim // 2
    angles = torch.complex(cos[:, :half], sin[:, :half])
    return torch.complex(heads[..., :half], heads[..., half:]) * angles


def rope_probe(model, layer, entry, vision):
    """|weighted change of the vision logits| and |change of the attention to vision|, a number a head."""
    attention = model.model.language_model.layers[layer].self_attn
    hidden, tables = entry
    query, keys = (
        complex_heads(getattr(attention, name)(hidden), tables, attention.head_dim)
        for name in ("q_proj", "k_proj")
    )
    keys = keys.repeat_interleave(len(query) // len(keys), dim=0)
    turn = torch.exp(1j * model.model.language_model.rotary_emb.inv_freq.double())
    moved = torch.where(vision[None, :, None], keys * turn, keys)
    logits, other = (
        (query[:, -1:].conj() * item).real.sum(-1) / attention.head_dim**0.5 for item in (keys, moved)
    )
    before, after = logits.softmax(-1), other.softmax(-1)
    weights = before[:, vision] / before[:, vision].sum(-1, keepdim=True)
    change = (weights * (other - logits)[:, vision]).sum(-1).abs()
    return change, (after[:, vision].sum(-1) - before[:, vision].sum(-1)).abs()


def direct(model, batch):
    """The means over the batch's prompts, one prompt at a time and everything kept."""
    found, norms = {}, {}
    for index in range(len(batch["input_ids"])):
        inputs = row_of(batch, index)
        output, states, seen = eager(model, inputs)
        vision = inputs["input_ids"][0] == model.config.image_token_id
        first = int(vision.nonzero()[0])
        text = ~vision & (torch.arange(len(vision)) >= first)
        for layer, state in enumerate(states):
            for name, chosen in (("norm_vision", vision), ("norm_text", text)):
                norms.setdefault((name, layer, None), []).extend(state[0, chosen].norm(dim=-1).tolist())
        for layer, attention in enumerate(output.attentions):
            looks = attention[0, :, -1]
            to_vision, to_text = looks[:, vision].sum(-1), looks[:, text].sum(-1)
            shares = looks[:, vision] / to_vision[:, None]
            entropy = -(shares * shares.log()).sum(-1) / torch.tensor(float(vision.sum())).log()
            rope = rope_probe(model, layer, seen[layer], vision)
            values = (to_vision / (to_vision + to_text), entropy, *rope)
            for name, heads in zip(BY_HEAD, values, strict=True):
                for head, value in enumerate(heads.tolist()):
                    found.setdefault((name, layer + 1, head), []).append(value)
    return {key: sum(values) / len(values) for key, values in (found | norms).items()}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("names", VARIANTS, ids=lambda names: "+".join(names) or "vanilla")
def test_measures_equal_a_direct_computation(names, side):
    model, batch = prepared(names, side)
    streamed = table(measure(model, [batch], shuffled(model)))
    wanted = direct(model, batch)
    assert {key[0] for key in wanted} == {*BY_HEAD, "norm_vision", "norm_text"}
    assert {key for key in streamed if not key[0].startswith("permuted")} == wanted.keys()
    for key, value in wanted.items():
        assert streamed[key] == pytest.approx(value, rel=1e-5, abs=1e-9), key


def test_the_normalised_input_has_the_norm_of_its_config():
    model, batch = prepared(("normalize_projector",))
    found = table(measure(model, [batch], shuffled(model)))
    wanted = model.config.projector_max_norm * model.config.projector_scale
    assert found["norm_vision", 0, None] == pytest.approx(wanted, rel=1e-4)


def test_a_stream_of_batches_equals_one_batch():
    model, batch = prepared(TWO_D)
    same = lambda number: permuted_vision_tokens(model, seed=7)  # noqa: E731
    whole = measure(model, [batch], same)
    parts = measure(model, (row_of(batch, index) for index in range(2)), same)
    assert [(row.measure, row.layer, row.head, row.count) for row in whole] == [
        (row.measure, row.layer, row.head, row.count) for row in parts
    ]
    assert [row.value for row in whole] == pytest.approx([row.value for row in parts], rel=1e-4, abs=1e-8)


def test_permutation_is_read_from_the_logits():
    model, batch = prepared()
    found = table(measure(model, [batch], shuffled(model)))
    with torch.no_grad():
        one = model(**batch).logits[:, -1]
        with permuted_vision_tokens(model, seed=0):
            other = model(**batch).logits[:, -1]
    last = model.config.text_config.num_hidden_layers
    assert found["permuted_logit", last, None] == pytest.approx(float((one - other).abs().mean()), rel=1e-9)
    assert found["permuted_token", last, None] == float((one.argmax(-1) != other.argmax(-1)).double().mean())
    assert found["permuted_logit", 0, None] == 0  # the last token is not moved


def test_without_a_permutation_nothing_changes():
    model, batch = prepared()
    found = table(measure(model, [batch], lambda number: permuted_vision_tokens(model)))
    assert {value for key, value in found.items() if key[0].startswith("permuted")} == {0.0}


def test_heads_are_looked_at_in_the_layers_asked_for():
    model, batch = prepared()
    rows = measure(model, [batch], shuffled(model), layers=[2])
    assert {row.layer for row in rows if row.measure in BY_HEAD} == {2}
    depth = model.config.text_config.num_hidden_layers
    assert {row.layer for row in rows if row.measure in BY_LAYER} == set(range(depth + 1))
    whole = table(measure(model, [batch], shuffled(model)))
    assert all(whole[key] == value for key, value in table(rows).items())


def test_one_vision_token_has_no_entropy():
    model, batch = prepared(("compression_after_projection",), final_spatial_size=1)
    rows = measure(model, [batch], shuffled(model))
    assert {row.measure for row in rows} == {*BY_HEAD, *BY_LAYER} - {"entropy"}


def test_what_can_not_be_measured_is_said(monkeypatch):
    model, batch = prepared()
    with pytest.raises(ValueError, match=r"layers: found \[99\]; the language model has layers 1 to"):
        measure(model, [batch], shuffled(model), layers=[99])
    with pytest.raises(ValueError, match="no prompt"):
        measure(model, [], shuffled(model))
    with pytest.raises(ValueError, match="each prompt needs a picture"):
        measure(model, [{"input_ids": torch.tensor([[1, 5, 6]])}], shuffled(model))
    config = model.model.language_model.layers[0].self_attn.config
    monkeypatch.setattr(config, "sliding_window", 4, raising=False)
    with pytest.raises(ValueError, match="see 4 tokens back"):
        measure(model, [batch], shuffled(model))
