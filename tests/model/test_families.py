"""The registers: every vision tower with every intervention, every language model's padding, and what is refused."""

import pytest
import torch

from llava_ext.model.language_models import GENERAL, LANGUAGE_MODELS, padding_token, turn_end_ids
from llava_ext.model.parts import BuildError, check_language_model, load_llm, load_tokenizer
from tests.support.families import byte_tokenizer, llama3_tokenizer, make_llm, qwen_tokenizer
from tests.support.models import LLM

# ---- language models --------------------------------------------------------------------------------------------


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
