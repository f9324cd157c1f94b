"""A turn whose content is a list of parts, as OpenAI's interface and chat templates have it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .templates import IMAGE_TOKEN

_TEXT = ("text", "input_text", "output_text")
_PICTURE = ("image_url", "image", "input_image")
_PLACES = ("image_url", "image", "path", "url", "file_name")
_SCHEME = re.compile(r"(data:|[A-Za-z][A-Za-z0-9+.-]+://)")


@dataclass(frozen=True)
class Parts:
    """A list of parts as LLaVA has it.

    Attributes:
        text: the texts and, for each picture, a placeholder, with line breaks between.
        names: of each picture; None for one that has none here.
        unknown: what is neither a text nor a picture, empty where there is nothing of the kind.
    """

    text: str
    names: tuple[str | None, ...]
    unknown: str = ""


def read_parts(content: Sequence[Any]) -> Parts:
    """Reads the parts of one turn."""
    texts: list[str] = []
    names: list[str | None] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in _TEXT and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in _PICTURE and len(place := _places(part)) == 1:
            texts.append(IMAGE_TOKEN)
            names += place
        else:
            return Parts("", (), f"{part!r:.80}")
    return Parts("\n".join(texts), tuple(names))


def _places(part: Mapping[str, Any]) -> list[str | None]:
    """Where a picture is: one name, one None where it has none, nothing where that is said in an unknown
    form.
    """
    said = [part[key] for key in _PLACES if part.get(key) is not None]
    places = [place.get("url") if isinstance(place, Mapping) else place for place in said]
    if not places:
        return [None] if set(part) <= {"type", "detail", *_PLACES} else []
    return [place for place in places if isinstance(place, str)]


def is_url(name: str) -> bool:
    """Whether a picture's name is an address or holds the picture itself, and so is no file of a source."""
    return _SCHEME.match(name) is not None
