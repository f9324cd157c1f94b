"""What a LLaVA record is made of: its turns, its pictures' names, its length in words."""

from __future__ import annotations

import msgspec


class Turn(msgspec.Struct):
    """One turn of a conversation."""

    speaker: str = msgspec.field(name="from")
    value: str


class RecordView(msgspec.Struct):
    """The parts of a LLaVA record that matter here; other keys are left alone."""

    conversations: list[Turn]
    id: str | int | float | None = None
    image: str | list[str] | None = None


record_decoder = msgspec.json.Decoder(RecordView)


def image_names(image: str | list[str] | None) -> list[str]:
    """The names in a record's ``image``: none, one or several."""
    if image is None:
        return []
    return [image] if isinstance(image, str) else list(image)


_SPACE_OR_NOT = bytes(32 if code < 128 and chr(code).isspace() else 120 for code in range(256))


def count_words(record: RecordView) -> int:
    """Words of all turns, negative without an image: what LLaVA's ``modality_lengths`` gives."""
    text = " " + " ".join([turn.value for turn in record.conversations])
    if text.isascii():
        # str.split() makes an object a word; on ASCII text, counting the words' beginnings is three times as
        # fast.
        words = text.encode().translate(_SPACE_OR_NOT).count(b" x")
    else:
        words = len(text.split())
    return words if record.image else -max(words, 1)


def join_name(name: str, prefix: str, root: str) -> str:
    """Replaces ``prefix`` (whole folders) at the beginning of an image's name by the folder ``root``."""
    rest = name[len(prefix) :].lstrip("/") if prefix else name
    return f"{root}/{rest}" if root else rest


def unsafe_path(name: str) -> bool:
    """True for an image path that is empty, absolute, has ``..`` in it, or a NUL."""
    return (
        not name or name.startswith(("/", "\\")) or "\0" in name or ".." in name.replace("\\", "/").split("/")
    )
