"""Conversations to token ids and labels, as the original LLaVA 1.5 makes them, to the id.

The templates are in :mod:`llava_ext.data.templates`. Sentinels are LLaVA's: -200 stands for an image, -100
for a label that is ignored. What the original does to unusual conversations (empty answers, a literal `</s>`,
...) is done here too: all labels of such a sample are masked and ``Encoded.mismatch`` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .chat import ChatTemplate, chat_of
from .image_token import MARK, marks_once
from .record_view import image_names
from .templates import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX, ConversationError, Template, template


@dataclass(frozen=True)
class Encoded:
    """One sample as ids and labels of equal length; ``mismatch`` when the reference masks it as a whole."""

    input_ids: list[int]
    labels: list[int]
    mismatch: bool = False


# -- tokens -----------------------------------------------------------------------------------------------


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of one piece of text, with BOS if the tokenizer has one.

    LLaVA was trained with the slow sentencepiece tokenizer, which puts a mark before every chunk, also before
    one that starts with a space; the fast one of today does not, so such a chunk gets one more space.
    """
    if marks_once(tokenizer):
        text = text.replace(MARK, " ")
        if text.startswith(" "):
            text = " " + text
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.truncation is None and backend.padding is None:
        ids: list[int] = backend.encode(text).ids  # the same ids, several times sooner
        return ids
    return list(tokenizer(text, verbose=False)["input_ids"])


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of a prompt in which each `<image>` becomes -200; each chunk between them is tokenised on its
    own.
    """
    chunks = [text_ids(tokenizer, chunk) for chunk in prompt.split(IMAGE_TOKEN)]
    bos = tokenizer.bos_token_id
    has_bos = bool(chunks[0]) and chunks[0][0] == bos
    ids = [bos] if has_bos else []
    for position, chunk in enumerate(chunks):
        if position:
            ids.append(IMAGE_TOKEN_INDEX)
        ids.extend(chunk[1:] if has_bos else chunk)
    return ids


# -- pictures ---------------------------------------------------------------------------------------------


def image_first(turns: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Turns of a sample with one image: in each turn all `<image>` are taken out and one is put in front,
    as LLaVA does.
    """
    moved = []
    for turn in turns:
        value = turn["value"]
        if IMAGE_TOKEN in value:
            value = f"{IMAGE_TOKEN}\n{value.replace(IMAGE_TOKEN, '').strip()}".strip()
        moved.append({"from": turn["from"], "value": value})
    return moved


def place_images(turns: list[dict[str, str]], pictures: int) -> list[dict[str, str]]:
    """One picture leads its turn, as in LLaVA; several stay where their placeholders are, in their order.

    Raises:
        ConversationError: several pictures, and not as many placeholders.
    """
    if pictures <= 1:
        return image_first(turns) if pictures else turns
    found = sum(turn["value"].count(IMAGE_TOKEN) for turn in turns)
    if found != pictures:
        raise ConversationError(_picture_mismatch(found, pictures, turns))
    return turns


def require_pictures(record: Mapping[str, Any], encoded: Encoded) -> None:
    """Raises :class:`ConversationError` when a sample asks for more pictures than it has. A picture that
    is not asked for is left out, as LLaVA does.
    """
    pictures, found = len(image_names(record.get("image"))), encoded.input_ids.count(IMAGE_TOKEN_INDEX)
    if found > pictures:
        raise ConversationError(_picture_mismatch(found, pictures, record["conversations"]))


def _picture_mismatch(found: int, pictures: int, turns: Sequence[Mapping[str, str]]) -> str:
    places = [
        f"turn {index} ({turn['from']})" for index, turn in enumerate(turns) if IMAGE_TOKEN in turn["value"]
    ]
    return (
        f"{found} {IMAGE_TOKEN} ({', '.join(places) or 'in no turn'}) for {pictures}"
        f" picture{'s' * (pictures != 1)}; each picture needs one {IMAGE_TOKEN} (a text that speaks of"
        f" {IMAGE_TOKEN} is a frequent cause)"
    )


# -- text -------------------------------------------------------------------------------------------------


def dialogue_text(style: Template, messages: Sequence[tuple[str, str]], system: str | None = None) -> str:
    """The whole text of (role, message) pairs; an empty message leaves its role open: `ASSISTANT:`.
    ``system`` replaces the template's own.
    """
    opening = style.system if system is None else system
    text = opening + style.separators[0] if opening else ""
    for index, (role, message) in enumerate(messages):
        text += f"{role}: {message}{style.separators[index % 2]}" if message else f"{role}:"
    return text


def inference_prompt(
    question: str,
    version: str,
    has_image: bool,
    tokenizer: Any = None,
    history: Sequence[tuple[str, str]] = (),
) -> str:
    """The text that asks ``question``, ending where the answer begins. ``chat`` needs the tokenizer, whose
    template it is.

    Args:
        has_image: a picture leads the first question, unless a question says where it goes.
        history: questions and answers that came before, as training sees the rounds of a dialogue.
    """
    style = template(version)
    if style.style == "caption":
        return IMAGE_TOKEN if has_image else question
    asked = [*(question for question, _ in history), question]
    if has_image and not any(IMAGE_TOKEN in text for text in asked):
        asked[0] = f"{IMAGE_TOKEN}\n{asked[0]}"
    rounds = zip(asked, [*(answer for _, answer in history), ""], strict=True)
    roles = ("user", "assistant") if style.style == "tokenizer" else style.roles
    turns = [turn for pair in rounds for turn in zip(roles, pair, strict=True)]
    if style.style == "tokenizer":
        messages = [{"role": role, "content": text} for role, text in turns[:-1]]
        return chat_of(tokenizer).render(messages, ask=True)
    return dialogue_text(style, turns)


def inference_ids(tokenizer: Any, prompt: str, version: str, has_image: bool) -> list[int]:
    """Ids of a whole prompt, each `<image>` as -200, as training has them."""
    if template(version).style == "tokenizer":
        return chat_of(tokenizer).ids(prompt, has_image)
    return prompt_ids(tokenizer, prompt)


def end_ids(tokenizer: Any, version: str | None) -> list[int]:
    """The ids that end an answer."""
    if version is not None and template(version).style == "tokenizer":
        return [chat_of(tokenizer).end_id]
    return [tokenizer.eos_token_id]


def check_template(version: str, tokenizer: Any) -> None:
    """Raises :class:`ConversationError` for an unknown template, or one that can't be used with this
    tokenizer.
    """
    if template(version).style == "tokenizer":
        chat_of(tokenizer)


# -- samples ----------------------------------------------------------------------------------------------


def encode(record: Mapping[str, Any], tokenizer: Any, version: str, max_length: int) -> Encoded:
    """Ids and labels of one LLaVA record (`conversations`, and an `image` key when it has one).

    Args:
        max_length: the tokenizer's limit; here it cuts text-only dialogues, and decides whether lengths are
            checked. Samples with an image are cut later, by the collator.

    Raises:
        ConversationError: roles that do not alternate, an unknown role, a caption sample without image, ...
    """
    style = template(version)
    pictures = len(image_names(record.get("image")))
    turns = place_images(_checked_turns(record), pictures)
    if style.style == "caption":
        return _encode_caption(turns, tokenizer, style)
    system, turns = _split_system(turns)
    if style.style == "tokenizer":
        return _encode_chat(system, turns, chat_of(tokenizer), max_length, pictures > 0)
    return _encode_dialogue(system, turns, tokenizer, style, max_length, pictures > 0)


def _checked_turns(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The record's turns, or an error that says what is wrong with them."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ConversationError(f"`conversations` must be a list of turns, found {turns!r:.80}")
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not all(
            isinstance(turn.get(key), str) for key in ("from", "value")
        ):
            raise ConversationError(f"turn {index}: expected {{from: text, value: text}}, found {turn!r:.80}")
    return turns


def _split_system(turns: list[dict[str, str]]) -> tuple[str | None, list[dict[str, str]]]:
    """The text of a leading system turn, and the turns of human and model."""
    if turns[0]["from"] != "system":
        return None, turns
    if len(turns) == 1:
        raise ConversationError("turn 0: a system turn alone is no conversation")
    return turns[0]["value"], turns[1:]


def _encode_caption(turns: list[dict[str, str]], tokenizer: Any, style: Template) -> Encoded:
    if len(turns) != 2 or IMAGE_TOKEN not in turns[0]["value"]:
        raise ConversationError(
            f"prompt version `plain` needs two turns, the first with {IMAGE_TOKEN}; found {len(turns)} turns,"
            f" the first {turns[0]['value']!r:.60}; use another prompt version for dialogues"
        )
    pictures = IMAGE_TOKEN * turns[0]["value"].count(IMAGE_TOKEN)
    ids = prompt_ids(tokenizer, pictures + turns[1]["value"] + style.separators[0])
    labels = list(ids)
    masked = len(prompt_ids(tokenizer, pictures))
    labels[:masked] = [IGNORE_INDEX] * masked
    return Encoded(ids, labels)


def _alternating(turns: list[dict[str, str]], first: int) -> list[dict[str, str]]:
    """The turns without a first one that is not human (as LLaVA has it); then human and gpt must alternate.

    ``first`` is the place of the first turn in its record, for messages.
    """
    for index, turn in enumerate(turns, first):
        if turn["from"] not in ("human", "gpt"):
            raise ConversationError(
                f"turn {index}: unknown role {turn['from']!r}; allowed are human and gpt, and system for the"
                " first turn"
            )
    if turns[0]["from"] != "human":
        turns, first = turns[1:], first + 1
    for index, turn in enumerate(turns):
        if turn["from"] != ("human", "gpt")[index % 2]:
            raise ConversationError(
                f"turn {first + index}: found {turn['from']!r}; human and gpt must alternate, human first"
            )
    return turns


def _encode_chat(
    system: str | None, turns: list[dict[str, str]], chat: ChatTemplate, max_length: int, has_image: bool
) -> Encoded:
    roles = {"human": "user", "gpt": "assistant"}
    messages = [
        {"role": roles[turn["from"]], "content": turn["value"]}
        for turn in _alternating(turns, int(system is not None))
    ]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    ids, labels = chat.encode(messages, has_image)
    limit = None if has_image else max_length
    return Encoded(ids[:limit], labels[:limit])


def _encode_dialogue(
    system: str | None,
    turns: list[dict[str, str]],
    tokenizer: Any,
    style: Template,
    max_length: int,
    has_image: bool,
) -> Encoded:
    roles = {"human": style.roles[0], "gpt": style.roles[1]}
    messages = [(roles[turn["from"]], turn["value"]) for turn in _alternating(turns, int(system is not None))]
    text = dialogue_text(style, messages, system)
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

    A round is what ends with `</s>`. From the second round on one id less is counted: after `</s>` the role
    has no mark of its own.
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
