"""Chat templates in the public formats of their families, and small byte-level tokenizers that have their
special tokens.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# Qwen 2.5: a default system text.
CHATML = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message['role'] != 'system' %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Qwen 3: only the last answer has its thoughts.
THINKING = (
    "{%- for message in messages %}{%- if message['role'] == 'assistant' and loop.last %}{{-"
    " '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + message['content'].lstrip('\\n') +"
    " '<|im_end|>\\n' }}{%- else %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] +"
    " '<|im_end|>\\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{-"
    " '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Llama 3.2: today's date in the system turn, contents trimmed.
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%-"
    " endif %}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}{%-"
    " set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}{{-"
    " '<|start_header_id|>system<|end_header_id|>\\n\\n' }}{{- 'Cutting Knowledge Date: December 2023\\nToday"
    " Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}{%- for message in messages %}{{-"
    " '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}{{-"
    " '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}{{-"
    " '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
# Mistral 7B Instruct v0.2: the system text goes into the first user turn; no generation prompt.
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set turns ="
    " messages[1:] %}{%- else %}{%- set turns = messages %}{%- endif %}{{- bos_token }}{%- for message in"
    " turns %}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must"
    " alternate') }}{%- endif %}{%- if message['role'] == 'user' %}{%- if loop.first and system is defined"
    " %}{{- ' [INST] ' + system + '\\n\\n' + message['content'] + ' [/INST]' }}{%- else %}{{- ' [INST] ' +"
    " message['content'] + ' [/INST]' }}{%- endif %}{%- else %}{{- ' ' + message['content'] + eos_token }}{%-"
    " endif %}{%- endfor %}"
)
# Mistral v0.3: the system text goes into the *last* user turn.
MISTRAL_LAST = MISTRAL.replace("loop.first and", "loop.index0 >= turns | length - 2 and")

TEXTS = [
    "What is in the picture? A red circle above a blue square.\n\nIt's the star, isn't it? Yes.",
    "user assistant system You are a helpful assistant. Cutting Knowledge Date: December 2023 Today",
]


def byte_level(
    template: str, *special: str, bos: str | None, eos: str, pad: str, adds_bos: bool = False
) -> Any:
    """A byte-level BPE with these special tokens, as Qwen's and Llama 3's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    backend.add_special_tokens(list(special))
    trim = processors.ByteLevel(trim_offsets=True)
    backend.post_processor = trim
    if adds_bos:
        opening = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
        backend.post_processor = processors.Sequence([trim, opening])
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in named.items() if token},
    )


def qwen(template: str = CHATML) -> Any:
    return byte_level(
        template,
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
    )


def llama3(template: str = LLAMA3) -> Any:
    names = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")
    return byte_level(template, *names, bos=names[0], eos="<|eot_id|>", pad="<|pad|>", adds_bos=True)


def mistral(template: str = MISTRAL) -> Any:
    names = ("<s>", "</s>", "<pad>", "[INST]", "[/INST]")
    return byte_level(template, *names, bos="<s>", eos="</s>", pad="<pad>", adds_bos=True)


FAMILIES = {"qwen": qwen, "qwen3": lambda: qwen(THINKING), "llama3": llama3, "mistral": mistral}
