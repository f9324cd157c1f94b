"""Tiny real model folders of every registered family: towers, language models and their tokenizers, with
random weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] +"
    " '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%"
    " endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] +"
    " '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt"
    " %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TEXTS = [
    "a red circle above a blue square",
    "Describe the picture.",
    "system user assistant",
    "1, 2, 3, 4, 5",
]
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)


def byte_tokenizer(special: tuple[str, ...], template: str | None, **named: str) -> Any:
    """A byte-level BPE tokenizer without `<unk>`, as Qwen's and Llama 3's, trained on a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(TEXTS, trainer)
    bpe.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=512, **named)
    tokenizer.chat_template = template
    return tokenizer


def qwen_tokenizer(**named: str) -> Any:
    """As Qwen's instruct models have it, unless told otherwise."""
    return byte_tokenizer(
        QWEN_TOKENS, CHATML, **({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | named)
    )


def llama3_tokenizer() -> Any:
    """As Llama 3.1's: a begin of text, no padding token."""
    return byte_tokenizer(LLAMA3_TOKENS, LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def make_llm(folder: Path, kind: str, tokenizer: Any, **changes: Any) -> Path:
    """A language model of transformers' type ``kind`` with two layers, and its tokenizer."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes | changes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TOWER_SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
PROCESSORS = {
    "clip_vision_model": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 56},
        "crop_size": {"height": 56, "width": 56},
    },
    "siglip_vision_model": {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 56, "width": 56},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 64},
        "crop_size": {"height": 56, "width": 56},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
}
PROCESSORS["dinov2_with_registers"] = PROCESSORS["dinov2"]


def make_tower(folder: Path, kind: str, processor: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A vision tower of transformers' type ``kind`` with random weights in every parameter, and its image
    processor.
    """
    from transformers import CONFIG_MAPPING, AutoModel

    sizes = TOWER_SIZES | ({"intermediate_size": 48} if kind.endswith("vision_model") else {"mlp_ratio": 2})
    torch.manual_seed(4)
    tower = AutoModel.from_config(CONFIG_MAPPING[kind](**sizes | changes))
    with torch.no_grad():  # also norms and registers, which would begin as ones and zeros
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tower.save_pretrained(folder)
    described = json.dumps(PROCESSORS[kind] | (processor or {}))
    (folder / "preprocessor_config.json").write_text(described, encoding="utf-8")
    return folder
