"""What is odd about a record, and the record with it mended; the kinds are in
:mod:`llava_ext.data.record_kinds`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from .content_parts import Parts, is_url, read_parts
from .record_kinds import Action
from .record_view import RecordView, Turn, image_names
from .templates import IMAGE_TOKEN

Record = dict[str, Any]
_KEYS = {"conversations": "conversations", "messages": "conversations"}
_TURN_KEYS = {"from": "from", "role": "from", "value": "value", "content": "value"}
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
_OTHER_CASE = re.compile(IMAGE_TOKEN, re.IGNORECASE)
_ROUNDS = {2 * rounds: ["human", "gpt"] * rounds for rounds in range(1, 65)}
_MOST_FIXES = 16


class View(RecordView):
    """A record's parts that matter, and the keys that LLaVA does not have."""

    images: Any = None
    video: Any = None


view_decoder = msgspec.json.Decoder(View)


@dataclass(frozen=True)
class Finding:
    """One odd thing: the kind's name, and what was found."""

    kind: str
    detail: str


@dataclass(frozen=True)
class Settled:
    """A record after its policy: with the findings, and what is to be done with it as a whole.

    ``action`` is ``fail`` or ``drop`` when any finding says so (``because``), else ``fix`` when the record
    was changed, else ``keep``.
    """

    record: Record
    findings: tuple[Finding, ...]
    action: Action
    because: str = ""


# -- checks -----------------------------------------------------------------------------------------------


def ordinary(record: View) -> bool:
    """True for a record without a finding, in the form that nearly all have; false says nothing. Made to
    be fast.
    """
    turns, names = record.conversations, image_names(record.image)
    if [turn.speaker for turn in turns] != _ROUNDS.get(len(turns)) or record.images is not None:
        return False
    values = [turn.value for turn in turns]
    count = len(names)
    # Of one picture or none, the placeholders are all in the first turn; other places are looked at slowly.
    if "\n".join(values).count(IMAGE_TOKEN) != count or values[0].count(IMAGE_TOKEN) != count:
        return False
    if record.video or (record.image is not None and not record.image):
        return False
    return all(values) and not any(map(_odd_path, names))


def _odd_path(name: str) -> bool:
    odd_end = not name or name[0] in "/\\." or name[-1] == "/" or is_url(name)
    return odd_end or "/." in name or "//" in name or ".." in name or "\0" in name


def check_record(record: Record) -> list[Finding]:
    """What is odd about a record. What hides other things is told alone: mend it, and check again.

    Raises:
        msgspec.ValidationError: the record is no conversation at all; the message says where.
    """
    if hidden := _other_keys(record) or _content_lists(record):
        return hidden
    view = msgspec.convert(record, View)
    if not view.conversations:
        raise msgspec.ValidationError("conversations is empty")
    return _role_names(view.conversations) or _picture_keys(view) or [*_turns(view), *_placeholders(view)]


def _other_keys(record: Any) -> list[Finding]:
    if not isinstance(record, dict):
        return []
    if "conversations" not in record:
        found = [key for key in record if key.lower() in _KEYS]
        return [Finding("other_keys", f"{found[0]!r} for 'conversations'")] if found else []
    turns = record["conversations"]
    for turn in turns if isinstance(turns, list) else []:
        if not isinstance(turn, dict) or {"from", "value"} <= turn.keys():
            continue
        if {_TURN_KEYS.get(key.lower()) for key in turn} >= {"from", "value"}:
            return [Finding("other_keys", f"a turn has {', '.join(map(repr, turn))}")]
    return []


def _parts(record: Record) -> list[Parts]:
    """The turns that are lists of parts."""
    turns = record.get("conversations")
    turns = turns if isinstance(turns, list) else []
    return [read_parts(turn["value"]) for turn in turns if _is_list(turn)]


def _is_list(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("value"), list)


def _content_lists(record: Any) -> list[Finding]:
    parts = _parts(record) if isinstance(record, dict) else []
    if unknown := [part.unknown for part in parts if part.unknown]:
        return [Finding("unknown_part", unknown[0])]
    names = [name for part in parts for name in part.names]
    if None in names and any(names):
        return [
            Finding("unknown_part", f"{len(names) - names.count(None)} of {len(names)} pictures have a name")
        ]
    return [Finding("content_list", f"{parts[0].text!r:.80}")] if parts else []


def _role_names(turns: Sequence[Turn]) -> list[Finding]:
    odd = [turn.speaker for turn in turns if _ROLES.get(turn.speaker.lower(), turn.speaker) != turn.speaker]
    return [Finding("role_names", ", ".join(map(repr, dict.fromkeys(odd))))] if odd else []


def _picture_keys(view: View) -> list[Finding]:
    found = []
    if view.images is not None:
        found.append(Finding("images_key", f"{view.images!r:.80}"))
    elif view.image is not None and not view.image:
        found.append(Finding("empty_image", repr(view.image)))
    for name in image_names(view.image):
        if is_url(name):
            return [*found, Finding("picture_url", name[:80])]
    for name in image_names(view.image):
        if name.startswith("/"):
            found.append(Finding("absolute_path", name[:200]))
            break
    for name in image_names(view.image):
        if name and not name.startswith("/") and _plain_path(name) != name:
            found.append(Finding("dot_path", name[:200]))
            break
    return found


def _turns(view: View) -> list[Finding]:
    """What is odd about the turns."""
    found = [Finding("video", f"{view.video!r:.80}")] if view.video else []
    roles = [turn.speaker for turn in view.conversations]
    found += [Finding("empty_value", f"turn {i}") for i, t in enumerate(view.conversations) if not t.value][
        :1
    ]
    if roles[:1] == ["system"]:
        found.append(Finding("system_turn", f"{view.conversations[0].value!r:.80}"))
    start = int(roles[:1] == ["system"])
    sides = roles[start:]
    if unknown := [role for role in roles if role not in ("human", "gpt", "system")]:
        return [*found, Finding("unknown_role", repr(unknown[0]))]
    if "system" in sides:
        return [*found, Finding("late_system", f"turn {start + sides.index('system')}")]
    repeated = [start + i for i in range(1, len(sides)) if sides[i] == sides[i - 1]]
    if repeated:
        return [
            *found,
            Finding("repeated_side", f"turns {repeated[0] - 1} and {repeated[0]} are {roles[repeated[0]]}'s"),
        ]
    return found + _ends(sides) if roles else found


def _ends(sides: list[str]) -> list[Finding]:
    """What is odd about the first and the last turn."""
    found = []
    if sides[:1] == ["gpt"]:
        found.append(Finding("first_gpt", "the first turn is gpt's"))
        sides = sides[1:]
    if len(sides) < 2:
        found.append(Finding("no_answer", f"turns: {', '.join(sides) or 'none'} after the opening"))
    elif sides[-1] == "human":
        found.append(Finding("last_human", "the last turn is human's"))
    return found


def _placeholders(view: View) -> list[Finding]:
    """What is odd about the pictures' places."""
    pictures = len(image_names(view.image))
    counts = [turn.value.count(IMAGE_TOKEN) for turn in view.conversations]
    total = sum(counts)
    told = f"{total} {IMAGE_TOKEN} for {pictures} picture{'s' * (pictures != 1)}"
    if not pictures:
        return [Finding("text_placeholder", told)] if total else []
    found = []
    if total < pictures and any(len(_OTHER_CASE.findall(t.value)) for t in view.conversations if t.value):
        other = [m for t in view.conversations for m in _OTHER_CASE.findall(t.value) if m != IMAGE_TOKEN]
        found += [Finding("placeholder_case", other[0])] if other else []
    places = sum(map(bool, counts)) if pictures == 1 else total
    if not total and pictures == 1:
        found.append(Finding("no_placeholder", told))
    elif places != pictures:
        found.append(Finding("more_placeholders" if places > pictures else "fewer_placeholders", told))
    elif total > pictures:
        found.append(Finding("repeated_placeholder", told))
    answers = [i for i, turn in enumerate(view.conversations) if turn.speaker == "gpt" and counts[i]]
    return found + ([Finding("placeholder_in_answer", f"turn {answers[0]}")] if answers else [])


# -- fixes ------------------------------------------------------------------------------------------------


def _plain_path(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return "/" * name.startswith("/") + "/".join(parts)


def _renamed(record: Record) -> Record:
    renamed = {_KEYS.get(key.lower(), key): value for key, value in record.items()}
    turns = renamed["conversations"]
    if isinstance(turns, list):
        renamed["conversations"] = [
            (
                {_TURN_KEYS.get(key.lower(), key): text for key, text in turn.items()}
                if isinstance(turn, dict)
                else turn
            )
            for turn in turns
        ]
    return renamed


def _without_lists(record: Record) -> Record:
    names = [name for part in _parts(record) for name in part.names if name is not None]
    turns = [
        turn | {"value": read_parts(turn["value"]).text} if _is_list(turn) else turn for turn in _of(record)
    ]
    has_pictures = bool(record.get("image") or record.get("images"))
    more = {} if has_pictures or not names else {"image": names[0] if len(names) == 1 else names}
    return _with_turns(record | more, turns)


def _with_roles(record: Record) -> Record:
    return _with_turns(
        record, [turn | {"from": _ROLES.get(turn["from"].lower(), turn["from"])} for turn in _of(record)]
    )


def _of(record: Record) -> list[dict[str, Any]]:
    return list(record["conversations"])


def _with_turns(record: Record, turns: list[dict[str, Any]]) -> Record:
    return record | {"conversations": turns}


def _with_image(record: Record) -> Record:
    images = record["images"]
    image = record.get("image") or (images if images else None)
    rest = {key: value for key, value in record.items() if key not in ("images", "image")}
    return rest | {"image": image} if image else rest


def _without_image(record: Record) -> Record:
    return {key: value for key, value in record.items() if key != "image"}


def _with_paths(change: Callable[[str], str]) -> Callable[[Record], Record]:
    def apply(record: Record) -> Record:
        image = record["image"]
        return record | {
            "image": change(image) if isinstance(image, str) else [change(name) for name in image]
        }

    return apply


def _without_system(record: Record) -> Record:
    return _with_turns(record, [turn for turn in _of(record) if turn["from"] != "system"])


def _without_late_system(record: Record) -> Record:
    turns = _of(record)
    return _with_turns(record, turns[:1] + [turn for turn in turns[1:] if turn["from"] != "system"])


def _joined(record: Record) -> Record:
    turns: list[dict[str, Any]] = []
    for turn in _of(record):
        if turns and turns[-1]["from"] == turn["from"]:
            turns[-1] = turns[-1] | {"value": f"{turns[-1]['value']}\n{turn['value']}"}
        else:
            turns.append(turn)
    return _with_turns(record, turns)


def _without_first_gpt(record: Record) -> Record:
    turns = _of(record)
    start = int(turns[0]["from"] == "system")
    return _with_turns(record, turns[:start] + turns[start + 1 :])


def _lower_placeholders(record: Record) -> Record:
    return _with_turns(
        record, [turn | {"value": _OTHER_CASE.sub(IMAGE_TOKEN, turn["value"])} for turn in _of(record)]
    )


def _more_placeholders_in_front(record: Record) -> Record:
    turns = _of(record)
    lacking = len(image_names(record["image"])) - sum(turn["value"].count(IMAGE_TOKEN) for turn in turns)
    first = next((i for i, turn in enumerate(turns) if turn["from"] == "human"), 0)
    turns[first] = turns[first] | {"value": f"{IMAGE_TOKEN}\n" * max(lacking, 0) + turns[first]["value"]}
    return _with_turns(record, turns)


def _fewer_placeholders(record: Record) -> Record:
    """The first placeholders stay, one for each picture."""
    left, turns = len(image_names(record["image"])), []
    for turn in _of(record):
        first, *others = turn["value"].split(IMAGE_TOKEN)
        for text in others:
            first += (IMAGE_TOKEN if left > 0 else "") + text
            left -= 1
        turns.append(turn | {"value": first})
    return _with_turns(record, turns)


FIXES: Mapping[str, Callable[[Record], Record]] = {
    "other_keys": _renamed,
    "content_list": _without_lists,
    "role_names": _with_roles,
    "images_key": _with_image,
    "empty_image": _without_image,
    "dot_path": _with_paths(_plain_path),
    "absolute_path": _with_paths(lambda name: name.lstrip("/")),
    "late_system": _without_late_system,
    "system_turn": _without_system,
    "repeated_side": _joined,
    "first_gpt": _without_first_gpt,
    "last_human": lambda record: _with_turns(record, _of(record)[:-1]),
    "placeholder_case": _lower_placeholders,
    "no_placeholder": _more_placeholders_in_front,
    "fewer_placeholders": _more_placeholders_in_front,
    "more_placeholders": _fewer_placeholders,
    "repeated_placeholder": _fewer_placeholders,
}


def fix_record(record: Record, findings: Sequence[Finding], actions: Mapping[str, Action]) -> Record:
    """A new record in which the first finding that is to be fixed is; the same object when there is none."""
    for finding in findings:
        if actions[finding.kind] == "fix":
            return FIXES[finding.kind](record)
    return record


# -- policy -----------------------------------------------------------------------------------------------


def settle(record: Record, actions: Mapping[str, Action]) -> Settled:
    """Checks and mends until nothing is left to mend.

    Args:
        actions: what is done for each kind, all of them.

    Raises:
        msgspec.ValidationError: the record is no conversation at all.
    """
    seen: dict[str, Finding] = {}
    fixed = record
    for _ in range(_MOST_FIXES):
        findings = check_record(fixed)
        for finding in findings:
            seen.setdefault(finding.kind, finding)
        for action in ("fail", "drop"):
            if because := [f.kind for f in findings if actions[f.kind] == action]:
                return Settled(fixed, tuple(seen.values()), action, because[0])
        after = fix_record(fixed, findings, actions)
        if after is fixed:
            break
        fixed = after
    return Settled(fixed, tuple(seen.values()), "keep" if fixed is record else "fix")


def mend(data: bytes, actions: Mapping[str, Action]) -> bytes:
    """The JSON of a record with what the policy fixes."""
    return msgspec.json.encode(settle(msgspec.json.decode(data), actions).record)
