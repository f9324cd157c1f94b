"""The register of what can be odd about a record, with what is done about it. Plain Python.

To add a kind, add an entry here and its check (and fix) to :mod:`llava_ext.data.records`; the config's
`policy.records`, the mixture's manifest, the report and the table in docs/data.md follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

Action = Literal["fix", "keep", "drop", "fail"]


@dataclass(frozen=True)
class Kind:
    """One kind of finding.

    Attributes:
        what: what the record looks like.
        keep: what a training does with it as it is; None where it can't be trained on.
        fix: how the record is changed; None where nobody can know what was meant.
        default: the action where the configuration says nothing. What LLaVA's own training accepts is kept.
    """

    what: str
    keep: str | None
    fix: str | None
    default: Action

    @property
    def actions(self) -> tuple[Action, ...]:
        """What a policy may say."""
        wanted: tuple[tuple[Action, bool], ...] = (
            ("fix", self.fix is not None),
            ("keep", self.keep is not None),
            ("drop", True),
            ("fail", True),
        )
        return tuple(action for action, possible in wanted if possible)


KINDS: dict[str, Kind] = {
    "other_keys": Kind(
        "`messages`, `role` and `content` in the place of `conversations`, `from` and `value`, in any case",
        None,
        "LLaVA's keys",
        "fix",
    ),
    "content_list": Kind(
        "a turn is a list of parts (`type: text`, `image_url`, `image`), as OpenAI has it",
        None,
        "its text, with `<image>` for each picture; the pictures' names become `image`",
        "fix",
    ),
    "unknown_part": Kind(
        "a part of a turn that is neither text nor picture, or pictures with and without a name",
        None,
        None,
        "drop",
    ),
    "picture_url": Kind("a picture that is an address or lies in the record itself", None, None, "fail"),
    "role_names": Kind(
        "`user` and `assistant`, or `human`, `gpt`, `system` in another case", None, "LLaVA's names", "fix"
    ),
    "images_key": Kind(
        "a key `images`", None, "it becomes `image`; beside an `image` it is taken out", "fix"
    ),
    "empty_image": Kind("`image` is an empty text or list", None, "the key is taken out", "fix"),
    "dot_path": Kind("`./` or `//` in the path of an image", None, "the plain path", "fix"),
    "absolute_path": Kind(
        "an absolute path of an image",
        None,
        "the slash in front is taken away; `prefix` names the rest",
        "fail",
    ),
    "video": Kind("a key `video`", "as if the key were not there", None, "drop"),
    "unknown_role": Kind("a role that is none of human, gpt and system (a tool, ...)", None, None, "drop"),
    "late_system": Kind("a system turn that is not the first turn", None, "the turn is taken out", "drop"),
    "system_turn": Kind(
        "a system turn comes first",
        "its text takes the place of the template's",
        "the turn is taken out",
        "keep",
    ),
    "repeated_side": Kind(
        "two turns of one side in a row", None, "they become one turn, with a line break between", "drop"
    ),
    "no_answer": Kind("no answer to a human turn: nothing could be learned", None, None, "drop"),
    "first_gpt": Kind(
        "the first turn is the model's", "the turn is left out", "the turn is taken out", "keep"
    ),
    "last_human": Kind(
        "the last turn is the human's", "nothing is learned from the turn", "the turn is taken out", "keep"
    ),
    "empty_value": Kind(
        "a turn without text", "as LLaVA: all labels of a dialogue with it may be masked", None, "keep"
    ),
    "placeholder_case": Kind(
        "`<Image>` or `<IMAGE>` where a picture lacks its placeholder", "it is text", "`<image>`", "fix"
    ),
    "no_placeholder": Kind(
        "a picture, and no `<image>` in any turn",
        "the picture is not seen",
        "`<image>` leads the first human turn",
        "keep",
    ),
    "fewer_placeholders": Kind(
        "several pictures, and fewer `<image>`",
        None,
        "those that lack lead the first human turn",
        "drop",
    ),
    "more_placeholders": Kind(
        "more `<image>` than pictures (of one picture: in several turns)",
        None,
        "those behind the last picture's are taken out",
        "drop",
    ),
    "repeated_placeholder": Kind(
        "one picture, and several `<image>` in one turn",
        "they are one `<image>` in front of the turn",
        "the first stays",
        "keep",
    ),
    "placeholder_in_answer": Kind(
        "`<image>` in an answer", "the picture is part of the answer", None, "keep"
    ),
    "text_placeholder": Kind("`<image>` without a picture", "it is text", None, "keep"),
}


def default_actions() -> dict[str, Action]:
    """What is done where the configuration says nothing."""
    return {name: kind.default for name, kind in KINDS.items()}


def checked_actions(said: Mapping[str, str]) -> dict[str, Action]:
    """What was said, without what is the default anyway, so that saying it changes nothing.

    Raises:
        ValueError: an unknown kind, or an action that the kind does not have.
    """
    found: dict[str, Action] = {}
    for name, action in said.items():
        if name not in KINDS:
            close = get_close_matches(name, KINDS, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"the kinds are {', '.join(KINDS)}"
            raise ValueError(f"{name!r} is no kind of finding; {hint}")
        allowed = {str(item): item for item in KINDS[name].actions}
        if action not in allowed:
            raise ValueError(f"{name}: found {action!r}; allowed are {', '.join(allowed)}")
        if action != KINDS[name].default:
            found[name] = allowed[action]
    return found


def kinds_table() -> str:
    """The register as a table in Markdown, for docs/data.md."""
    lines = [
        "| kind | what | default | with `keep`, training | with `fix` |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, kind in KINDS.items():
        cells = (f"`{name}`", kind.what, f"`{kind.default}`", kind.keep or "-", kind.fix or "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
