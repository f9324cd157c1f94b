"""The register of prompt templates: how the turns of a conversation become one text. Plain Python.

To add one, add an entry to :data:`TEMPLATES`; the config's `prompt_version`, `--version`, the encoding of
samples, inference prompts and exported processors follow from it. Encoding itself is in
:mod:`llava_ext.data.conversation` and, for a tokenizer's own template, :mod:`llava_ext.data.chat`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100
IMAGE_TOKEN = "<image>"


class ConversationError(ValueError):
    """A record or a template that can't be encoded; the message says what was found and what is expected."""


@dataclass(frozen=True)
class Template:
    """How turns become one text.

    Attributes:
        description: one line for help texts and the reference page.
        style: ``caption``: pictures and their caption, the human's words are dropped. ``dialogue``:
            ``system`` + separators[0], then for each turn ``role: text`` + a separator (the first after human
            turns, the second after answers). ``tokenizer``: the chat template that comes with the tokenizer;
            the other fields are not used.
        system: the system text of a dialogue without a system turn.
        roles: what the human and the model are called.
        separators: what ends the human's turns and the answers.
    """

    description: str
    style: Literal["caption", "dialogue", "tokenizer"]
    system: str = ""
    roles: tuple[str, str] = ("USER", "ASSISTANT")
    separators: tuple[str, str] = (" ", "</s>")


TEMPLATES: dict[str, Template] = {
    "plain": Template(
        description="captions (stage 1)", style="caption", roles=("", ""), separators=("\n", "\n")
    ),
    "v1": Template(
        description="Vicuna's chat (stage 2)",
        style="dialogue",
        system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
    ),
    "chat": Template(description="the LLM's own chat template", style="tokenizer"),
}


def template(version: str) -> Template:
    """The template of that name. Raises :class:`ConversationError` with the known names."""
    if version not in TEMPLATES:
        raise ConversationError(
            f"prompt version: found {version!r}; allowed are {', '.join(sorted(TEMPLATES))}"
        )
    return TEMPLATES[version]


def described() -> str:
    """The register in one line: `plain` for captions (stage 1), ..."""
    return ", ".join(f"`{name}` for {entry.description}" for name, entry in TEMPLATES.items())


# -- Jinja, for transformers' processors ------------------------------------------------------------------

# Content as a list of parts or as text with <image> inside becomes the text of training: pictures that lead a
# turn stand on lines of their own, and the only picture of a conversation leads its turn, as LLaVA's.
PICTURES_IN_TEXT = (
    "{%- set ns = namespace(turns=[], pictures=0) -%}"
    "{%- for message in messages -%}"
    "{%- set turn = namespace(text='') -%}"
    "{%- if message['content'] is string -%}{%- set turn.text = message['content'] -%}"
    "{%- elif message['content'] -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}"
    "{%- set leads = turn.text.replace('<image>\\n', '') == '' and not loop.last -%}"
    "{%- set turn.text = turn.text ~ '<image>' ~ ('\\n' if leads else '') -%}"
    "{%- elif part['type'] == 'text' -%}{%- set turn.text = turn.text ~ part['text'] -%}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- set ns.pictures = ns.pictures + turn.text.count('<image>') -%}"
    "{%- set ns.turns = ns.turns + [dict(message, content=turn.text)] -%}"
    "{%- endfor -%}"
    "{%- set placed = namespace(turns=[]) -%}"
    "{%- for message in ns.turns -%}"
    "{%- if ns.pictures == 1 and '<image>' in message['content'] -%}"
    "{%- set text = ('<image>\\n' ~ message['content'].replace('<image>', '').strip()).strip() -%}"
    "{%- set message = dict(message, content=text) -%}"
    "{%- endif -%}"
    "{%- set placed.turns = placed.turns + [message] -%}"
    "{%- endfor -%}"
    "{%- set messages = placed.turns -%}"
)

# Some templates write today's date. A prompt that is another tomorrow is not the one of training, so their
# clock is stopped, at the day that Llama 3's template has when nobody tells it the date.
STOPPED_CLOCK = (
    "{%- macro strftime_now(format) -%}{{- format.replace('%d', '26').replace('%e', '26').replace('%b',"
    " 'Jul').replace('%B', 'July').replace('%m', '07').replace('%Y', '2024').replace('%y',"
    " '24').replace('%A', 'Friday').replace('%a', 'Fri').replace('%H', '12').replace('%I',"
    " '12').replace('%p', 'PM').replace('%M', '00').replace('%S', '00') -}}{%- endmacro -%}"
)


def dialogue_jinja(entry: Template) -> str:
    """A Jinja chat template with which transformers' own processor yields exactly the text of a dialogue's
    training.
    """
    human, gpt = entry.roles
    after_human, after_gpt = entry.separators
    return (
        f"{PICTURES_IN_TEXT}{{%- set system = {entry.system!r} -%}}{{%- if messages and messages[0]['role']"
        " == 'system' -%}{%- set system = messages[0]['content'] -%}{%- set messages = messages[1:]"
        f" -%}}{{%- endif -%}}{{{{- system ~ {after_human!r} if system else '' -}}}}{{%- for message in"
        " messages -%}{%- if message['role'] not in ('user', 'assistant') -%}{{-"
        " raise_exception('allowed roles are user and assistant, and system for the first message; found ' ~"
        " message['role']) -}}{%- endif -%}{%- set human = message['role'] == 'user' -%}{{-"
        f" {human + ':'!r} if human else {gpt + ':'!r} -}}}}{{%- if message['content'] -%}}{{{{- ' ' ~"
        f" message['content'] ~ ({after_human!r} if human else {after_gpt!r}) -}}}}{{%- endif -%}}{{%- endfor"
        f" -%}}{{%- if add_generation_prompt -%}}{{{{- {gpt + ':'!r} -}}}}{{%- endif -%}}"
    )
