"""Conversations to token ids and labels, as the original LLaVA 1.5 makes them, to the id.

A template is an entry of :data:`TEMPLATES`; to add one, add an entry. Sentinels are LLaVA's: -200 stands for an image, -100
for a label that is ignored. What the original does to unusual conversations (empty answers, a literal `</s>`, ...) is done here
too: all labels of such a sample are masked and ``Encoded.mismatch`` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100
IMAGE_TOKEN = "<image>"
MARK = "▁"  # sentencepiece's word mark


class ConversationError(ValueError):
    """A record that is no conversation of the template's form; the message says which turn and what is expected."""


@dataclass(frozen=True)
class Template:
    """How turns become one text.

    ``dialogue``: ``system`` + separators[0], then for each turn ``role: text`` + a separator (the first after human turns, the
    second after answers). ``caption``: an image and its caption, the human's words are dropped.
    """

    style: str
    system: str = ""
    roles: tuple[str, str] = ("USER", "ASSISTANT")
    separators: tuple[str, str] = (" ", "</s>")


TEMPLATES: dict[str, Template] = {
    "v1": Template(
        style="dialogue",
        system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
    ),
    "plain": Template(style="caption", roles=("", ""), separators=("\n", "\n")),
}


@dataclass(frozen=True)
class Encoded:
    """One sample as ids and labels of equal length; ``mismatch`` when the reference masks it as a whole."""

    input_ids: list[int]
    labels: list[int]
    mismatch: bool = False


def template(version: str) -> Template:
    """The template of that name. Raises :class:`ConversationError` with the known names."""
    if version not in TEMPLATES:
        raise ConversationError(
            f"prompt version: found {version!r}; allowed are {', '.join(sorted(TEMPLATES))}"
        )
    return TEMPLATES[version]


# -- tokens -------------------------------------------------------------------------------------------------------------


_MARKS_ONCE: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def _marks_once(tokenizer: Any) -> bool:
    """True for sentencepiece-like tokenizers that do not put a second mark before a chunk that starts with a space."""
    if tokenizer not in _MARKS_ONCE:
        pieces = tokenizer.tokenize("a")
        _MARKS_ONCE[tokenizer] = (
            bool(pieces) and pieces[0].startswith(MARK) and tokenizer.tokenize(" a") == pieces
        )
    return _MARKS_ONCE[tokenizer]


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of one piece of text, with BOS if the tokenizer has one.

    LLaVA was trained with the slow sentencepiece tokenizer, which puts a mark before every chunk, also before one that starts with a
    space; the fast one of today does not, so such a chunk gets one more space.
    """
    if _marks_once(tokenizer):
        text = text.replace(MARK, " ")
        if text.startswith(" "):
            text = " " + text
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.truncation is None and backend.padding is None:
        ids: list[int] = backend.encode(text).ids  # the same ids, several times sooner
        return ids
    return list(tokenizer(text, verbose=False)["input_ids"])


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of a prompt in which each `<image>` becomes -200; each chunk between them is tokenised on its own."""
    chunks = [text_ids(tokenizer, chunk) for chunk in prompt.split(IMAGE_TOKEN)]
    bos = tokenizer.bos_token_id
    has_bos = bool(chunks[0]) and chunks[0][0] == bos
    ids = [bos] if has_bos else []
    for position, chunk in enumerate(chunks):
        if position:
            ids.append(IMAGE_TOKEN_INDEX)
        ids.extend(chunk[1:] if has_bos else chunk)
    return ids


# -- text ---------------------------------------------------------------------------------------------------------------


def image_first(turns: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Turns of a sample with an image: in each turn all `<image>` are taken out and one is put in front, as LLaVA does."""
    moved = []
    for turn in turns:
        value = turn["value"]
        if IMAGE_TOKEN in value:
            value = f"{IMAGE_TOKEN}\n{value.replace(IMAGE_TOKEN, '').strip()}".strip()
        moved.append({"from": turn["from"], "value": value})
    return moved


def dialogue_text(style: Template, messages: Sequence[tuple[str, str]]) -> str:
    """The whole text of (role, message) pairs; an empty message leaves its role open: `ASSISTANT:`."""
    text = style.system + style.separators[0]
    for index, (role, message) in enumerate(messages):
        text += f"{role}: {message}{style.separators[index % 2]}" if message else f"{role}:"
    return text


def inference_prompt(question: str, version: str, has_image: bool) -> str:
    """The text that asks ``question``, ending where the answer begins."""
    style = template(version)
    if style.style == "caption":
        return IMAGE_TOKEN if has_image else question
    if has_image and IMAGE_TOKEN not in question:
        question = f"{IMAGE_TOKEN}\n{question}"
    return dialogue_text(style, [(style.roles[0], question), (style.roles[1], "")])


def chat_template(version: str) -> str | None:
    """A Jinja chat template with which transformers' own processor yields exactly the ids of training.

    The space after `<image>` stands for the mark that LLaVA's tokenisation of the next chunk begins with.
    """
    style = template(version)
    if style.style != "dialogue":
        return None
    human, gpt = style.roles
    return (
        f"{{{{ {style.system + style.separators[0]!r} }}}}"
        "{% for message in messages %}"
        f"{{% set human = message['role'] == 'user' %}}{{{{ {human!r} if human else {gpt!r} }}}}{{{{ ':' }}}}"
        "{% set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string else message['content'] %}"
        "{% set text = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') %}"
        "{% set images = parts | selectattr('type', 'equalto', 'image') | list %}"
        "{% if text or images %}"
        "{{ ' ' }}{% for image in images %}{{ '<image> ' }}{% if text and loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
        f"{{{{ text }}}}{{{{ {style.separators[0]!r} if human else {style.separators[1]!r} }}}}"
        "{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {gpt + ':'!r} }}}}{{% endif %}}"
    )


# -- samples ------------------------------------------------------------------------------------------------------------


def encode(record: Mapping[str, Any], tokenizer: Any, version: str, max_length: int) -> Encoded:
    """Ids and labels of one LLaVA record (`conversations`, and an `image` key when it has one).

    Args:
        max_length: the tokenizer's limit; here it cuts text-only dialogues, and decides whether lengths are checked. Samples
            with an image are cut later, by the collator.

    Raises:
        ConversationError: roles that do not alternate, an unknown role, a caption sample without image, ...
    """
    style = template(version)
    turns = _checked_turns(record)
    has_image = "image" in record
    if has_image:
        turns = image_first(turns)
    if style.style == "caption":
        return _encode_caption(turns, tokenizer, style)
    return _encode_dialogue(turns, tokenizer, style, max_length, has_image)


def _checked_turns(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The record's turns, or an error that says what is wrong with them."""
    name, turns = record.get("id", "?"), record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ConversationError(
            f"record {name!r}: `conversations` must be a list of turns, found {turns!r:.80}"
        )
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not all(
            isinstance(turn.get(key), str) for key in ("from", "value")
        ):
            raise ConversationError(
                f"record {name!r}, turn {index}: expected {{from: text, value: text}}, found {turn!r:.80}"
            )
    return turns


def _encode_caption(turns: list[dict[str, str]], tokenizer: Any, style: Template) -> Encoded:
    if len(turns) != 2 or IMAGE_TOKEN not in turns[0]["value"]:
        raise ConversationError(
            f"prompt version `plain` needs two turns, the first with {IMAGE_TOKEN}; found {len(turns)} turns, the first "
            f"{turns[0]['value']!r:.60}; use another prompt version for dialogues"
        )
    ids = prompt_ids(tokenizer, IMAGE_TOKEN + turns[1]["value"] + style.separators[0])
    labels = list(ids)
    masked = len(prompt_ids(tokenizer, IMAGE_TOKEN))
    labels[:masked] = [IGNORE_INDEX] * masked
    return Encoded(ids, labels)


def _messages(turns: list[dict[str, str]], style: Template) -> list[tuple[str, str]]:
    """(role, message) pairs; a first turn that is not human is skipped, then human and gpt must alternate."""
    roles = {"human": style.roles[0], "gpt": style.roles[1]}
    for index, turn in enumerate(turns):
        if turn["from"] not in roles:
            raise ConversationError(f"turn {index}: unknown role {turn['from']!r}; allowed are human and gpt")
    if turns[0]["from"] != "human":
        turns = turns[1:]
    for index, turn in enumerate(turns):
        if roles[turn["from"]] != style.roles[index % 2]:
            raise ConversationError(
                f"turn {index}: found {turn['from']!r}; human and gpt must alternate, human first"
            )
    return [(roles[turn["from"]], turn["value"]) for turn in turns]


def _encode_dialogue(
    turns: list[dict[str, str]], tokenizer: Any, style: Template, max_length: int, has_image: bool
) -> Encoded:
    text = dialogue_text(style, _messages(turns, style))
    tokenise = prompt_ids if has_image else text_ids
    ids = tokenise(tokenizer, text)
    if not has_image:
        ids = ids[:max_length]
    labels, checked = _answer_labels(text, ids, tokenizer, style, tokenise)
    real = len(ids) - ids.count(tokenizer.pad_token_id)
    if checked < max_length and checked != real:
        return Encoded(ids, [IGNORE_INDEX] * len(ids), mismatch=True)
    return Encoded(ids, labels)


def _answer_labels(
    text: str, ids: list[int], tokenizer: Any, style: Template, tokenise: Any
) -> tuple[list[int], int]:
    """Labels with everything but the answers masked, and how many ids the rounds account for.

    A round is what ends with `</s>`. From the second round on one id less is counted: after `</s>` the role has no mark of its own.
    """
    labels, opening, position = list(ids), f" {style.roles[1]}: ", 1
    labels[:1] = [IGNORE_INDEX] * len(labels[:1])
    for index, text_round in enumerate(text.split(style.separators[1])):
        parts = text_round.split(opening)
        if not text_round or len(parts) != 2:
            break
        later = int(index > 0)
        length = len(tokenise(tokenizer, text_round)) - later
        instruction = len(tokenise(tokenizer, parts[0] + opening)) - 2 - later
        # Slices of Python lists grow when they reach over the end, so both ends are bounded.
        start, end = min(position, len(labels)), min(position + instruction, len(labels))
        labels[start:end] = [IGNORE_INDEX] * max(0, end - start)
        position += length
    tail = max(0, len(labels) - position)
    if tail:
        labels[position:] = [IGNORE_INDEX] * tail
    return labels, position
