"""Odd records: each kind is found, mended as it says, and what is kept can be trained on."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_ext.data.conversation import encode, require_pictures
from llava_ext.data.record_kinds import KINDS, checked_actions, default_actions, kinds_table
from llava_ext.data.records import FIXES, View, check_record, ordinary, settle
from llava_ext.data.templates import ConversationError
from tests.support.families import llama3_tokenizer
from tests.support.fuzzing import RECORD


def record(*turns, **more):
    """Turns as (role, text)."""
    return {"id": 1, "conversations": [{"from": role, "value": text} for role, text in turns], **more}


def talk(question="<image>\nwhat", answer="a cat", **more):
    return record(("human", question), ("gpt", answer), **more)


def parts(*contents, answer="a cat"):
    """A question of parts, as OpenAI has it: texts, pictures' names, None for one without a name."""

    def part(content):
        if content is None:
            return {"type": "image"}
        if isinstance(content, dict):
            return content
        kind = "image_url" if "." in content else "text"
        return {"type": kind, kind: {"url": content} if kind == "image_url" else content}

    return record(("human", [part(content) for content in contents]), ("gpt", answer))


SEEN = talk(image="a.jpg")
# kind, a record, what `fix` makes of it (None: there is no fix)
ODD = [
    (
        "other_keys",
        {"messages": [{"Role": "user", "content": "a"}, {"role": "ASSISTANT", "Content": "b"}]},
        talk("a", "b"),
    ),
    ("content_list", parts("what", "a.jpg"), talk("what\n<image>", image="a.jpg")),
    (
        "content_list",
        parts("a.jpg", "b.jpg", "what"),
        talk("<image>\n<image>\nwhat", image=["a.jpg", "b.jpg"]),
    ),
    ("content_list", parts(None, "what") | {"image": "a.jpg"}, SEEN),
    ("unknown_part", parts("what", {"type": "input_audio", "input_audio": {"data": "AA"}}), None),
    ("unknown_part", parts("what", "a.jpg", None), None),
    ("unknown_part", parts({"type": "image", "source": {"type": "base64", "data": "AA"}}), None),
    ("picture_url", parts("https://example.org/a.jpg", "what"), None),
    ("picture_url", talk(image="data:image/png;base64,AA"), None),
    ("role_names", record(("User", "a"), ("Assistant", "b")), talk("a", "b")),
    ("images_key", talk(images=["a.jpg"]), talk(image=["a.jpg"])),
    ("images_key", talk(image="a.jpg", images=["b.jpg"]), SEEN),
    ("empty_image", talk("a", image=""), talk("a")),
    ("empty_image", talk("a", image=[]), talk("a")),
    ("dot_path", talk(image="./b//./a.jpg"), talk(image="b/a.jpg")),
    ("absolute_path", talk(image="/b/a.jpg"), talk(image="b/a.jpg")),
    ("video", talk("a", video="a.mp4"), None),
    ("unknown_role", record(("human", "a"), ("tool", "b"), ("gpt", "c")), None),
    ("late_system", record(("human", "a"), ("system", "b"), ("gpt", "c")), talk("a", "c")),
    ("system_turn", record(("system", "s"), ("human", "a"), ("gpt", "b")), talk("a", "b")),
    ("repeated_side", record(("human", "a"), ("human", "b"), ("gpt", "c")), talk("a\nb", "c")),
    ("no_answer", record(("human", "a")), None),
    ("first_gpt", record(("gpt", "hello"), ("human", "a"), ("gpt", "b")), talk("a", "b")),
    ("last_human", record(("human", "a"), ("gpt", "b"), ("human", "c")), talk("a", "b")),
    ("empty_value", talk("a", ""), None),
    ("placeholder_case", talk("<Image>\nwhat", image="a.jpg"), SEEN),
    ("no_placeholder", talk("what", image="a.jpg"), SEEN),
    (
        "fewer_placeholders",
        talk(image=["a.jpg", "b.jpg"]),
        talk("<image>\n<image>\nwhat", image=["a.jpg", "b.jpg"]),
    ),
    (
        "more_placeholders",
        record(("human", "<image>"), ("gpt", "a"), ("human", "<image>b"), ("gpt", "c"), image="a.jpg"),
        record(("human", "<image>"), ("gpt", "a"), ("human", "b"), ("gpt", "c"), image="a.jpg"),
    ),
    (
        "more_placeholders",
        talk("<image><image><image>", image=["a", "b"]),
        talk("<image><image>", image=["a", "b"]),
    ),
    ("repeated_placeholder", talk("<image>a<image>", image="a.jpg"), talk("<image>a", image="a.jpg")),
    ("placeholder_in_answer", talk("what", "this: <image>", image="a.jpg"), None),
    ("text_placeholder", talk(), None),
]
FIX_ALL = {name: "fix" if kind.fix else kind.default for name, kind in KINDS.items()}


@pytest.mark.parametrize(("kind", "odd", "fixed"), ODD, ids=[f"{n}-{odd[0]}" for n, odd in enumerate(ODD)])
def test_each_kind_is_found_and_mended(kind, odd, fixed):
    settled = settle(odd, default_actions() | {kind: "fix" if fixed else "drop"} | {"role_names": "fix"})
    assert kind in [finding.kind for finding in settled.findings]
    if fixed is None:
        assert (settled.action, settled.because) == ("drop", kind)
    else:
        assert settled.action == "fix"
        assert settled.record | {"id": 1} == fixed
        assert kind not in [finding.kind for finding in check_record(settled.record)]


def test_every_kind_has_an_example_here_and_a_fix_where_it_says_so():
    assert {kind for kind, *_ in ODD} == set(KINDS)
    assert set(FIXES) == {name for name, kind in KINDS.items() if kind.fix}
    assert all(kind.default in kind.actions for kind in KINDS.values())


def test_the_table_in_the_docs_is_the_register():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert f"\n\n{kinds_table()}\n<!-- end of kinds -->" in page


def test_fail_goes_before_drop_and_drop_before_fix():
    odd = record(("human", "<Image>"), ("tool", "b"), image="a.jpg")
    assert settle(odd, FIX_ALL).because == "unknown_role"
    assert settle(odd, FIX_ALL | {"placeholder_case": "fail"}).because == "placeholder_case"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"system_trun": "drop"}, "did you mean 'system_turn'"),
        ({"video": "fix"}, "allowed are keep, drop, fail"),
        ({"role_names": "keep"}, "allowed are fix, drop, fail"),
    ],
)
def test_what_a_policy_can_not_say(said, message):
    with pytest.raises(ValueError, match=message):
        checked_actions(said)


@pytest.mark.parametrize("turn", [None, 3, [], {}, {"from": "human"}, {"from": "human", "value": None}])
def test_a_turn_that_is_none_is_named_beside_any_other(turn):
    """Also beside one that is to be mended."""
    odd = {"conversations": [turn, {"from": "gpt", "value": ["a", {"type": "image"}]}]}
    with pytest.raises(msgspec.ValidationError, match="conversations"):
        settle(odd, default_actions())


# records at random
# ------------------------------------------------------------------------------------------------------

POLICY = st.fixed_dictionaries({name: st.sampled_from(kind.actions) for name, kind in KINDS.items()})
TOKENIZER = llama3_tokenizer()


@settings(max_examples=300, deadline=None)
@given(RECORD, POLICY)
def test_what_any_policy_leaves_can_be_trained_on(odd, policy):
    """Or it is a message: a record that is no conversation; `plain` for what is no caption."""
    try:
        settled = settle(odd, policy)
    except msgspec.ValidationError:
        return
    if settled.because:
        return
    encoded = encode(_as_stored(settled.record), TOKENIZER, "v1", 512)
    require_pictures(settled.record, encoded)
    assert len(encoded.input_ids) == len(encoded.labels)
    try:
        encode(_as_stored(settled.record), TOKENIZER, "plain", 512)
    except ConversationError as error:
        assert "`plain`" in str(error)


def _as_stored(kept):
    return kept if kept.get("image", True) else {key: value for key, value in kept.items() if key != "image"}


@settings(max_examples=300, deadline=None)
@given(RECORD)
def test_the_fast_look_lets_nothing_pass_that_the_close_look_finds(odd):
    try:
        view = msgspec.convert(odd, View)
    except msgspec.ValidationError:
        return
    if ordinary(view):
        assert check_record(odd) == []


@settings(max_examples=200, deadline=None)
@given(RECORD)
def test_mending_a_mended_record_changes_nothing(odd):
    try:
        settled = settle(odd, FIX_ALL)
        again = settle(settled.record, FIX_ALL)
    except msgspec.ValidationError:
        return
    assert settled.because or again.record == settled.record
