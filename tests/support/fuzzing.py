"""How hard the random tests try, and the strategies that several share.

The short profile is part of the fast tests and always tries the same examples. The long one is marked slow;
`FUZZ_EXAMPLES=5000 pytest -m slow tests/fuzz` tries as many new ones.
"""

import copy
import os
from types import FunctionType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def tries(short, long, **strategies):
    """Tries a test with values at random: ``short`` of them, and, as a second test that is slow, ``long``.

    The test gets what pytest's fixtures and the strategies give it.
    """
    wanted = os.environ.get("FUZZ_EXAMPLES")

    def decorate(test):
        other = FunctionType(
            test.__code__, test.__globals__, f"{test.__name__}_long", closure=test.__closure__
        )
        other.__dict__.update(
            test.__dict__, pytestmark=[*getattr(test, "pytestmark", []), pytest.mark.slow.mark]
        )
        thorough = _settings(int(wanted or long), derandomize=not wanted)(given(**strategies)(other))
        test.__globals__[other.__name__] = thorough  # where pytest finds it
        return _settings(short, derandomize=True)(given(**strategies)(test))

    return decorate


def _settings(examples, derandomize):
    checks = list(HealthCheck)
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=derandomize,
        database=None,
        suppress_health_check=checks,
    )


# -- JSON ---------------------------------------------------------------------------------------------------

LEAF = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=12)
    | st.sampled_from(["", "\0", "\ud800", "é", "..", "1e9", "0600", "yes", "~"])
)
VALUE = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def paths_of(value, prefix=()):
    """Every place in a JSON value, as the keys that lead there."""
    found = [prefix] if prefix else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += paths_of(inner, (*prefix, key))
    return found


@st.composite
def changed(draw, value, most=3):
    """A JSON value with a few places replaced, removed, renamed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(0, most))):
        places = paths_of(value)
        if not places:
            return value
        *way, last = draw(st.sampled_from(places))
        inner = value
        for key in way:
            inner = inner[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "rename", "double"])):
            case "replace":
                inner[last] = draw(VALUE)
            case "remove":
                del inner[last]
            case "rename" if isinstance(inner, dict):
                inner[draw(st.text(max_size=8) | st.sampled_from(places).map(lambda p: p[-1]).map(str))] = (
                    inner.pop(last)
                )
            case "double" if isinstance(inner, list):
                inner.insert(last, copy.deepcopy(inner[last]))
    return value


# -- conversations ------------------------------------------------------------------------------------------

ROLES = st.sampled_from(["human", "gpt", "human", "gpt", "user", "Assistant", "system", "tool", ""])
TEXT = st.lists(
    st.sampled_from(
        ["<image>", "<Image>", "\n", "a", " b ", "</s>", "USER: ", " ASSISTANT: ", "é", "\ud83d\ude00"]
    ),
    max_size=4,
).map(lambda parts: "".join(parts).encode("utf-16", "surrogatepass").decode("utf-16"))
NAME = st.sampled_from(
    ["a.jpg", "./a.jpg", "/b/a.jpg", "b//a.jpg", "", "../a.jpg", "a/", ".", "https://x/a.jpg"]
)
PART = st.one_of(
    TEXT,
    st.builds(lambda text: {"type": "text", "text": text}, TEXT),
    st.builds(lambda name: {"type": "image_url", "image_url": {"url": name}}, NAME),
    st.sampled_from([{"type": "image"}, {"type": "input_audio"}, {}, None]),
)
CONTENT = st.one_of(TEXT, TEXT, TEXT, st.lists(PART, max_size=3))
TURN_KEYS = st.sampled_from([("from", "value"), ("from", "value"), ("role", "content"), ("Role", "VALUE")])
TURN = st.builds(
    lambda keys, role, text: dict(zip(keys, (role, text), strict=True)), TURN_KEYS, ROLES, CONTENT
)
USUAL = st.integers(1, 3).flatmap(
    lambda n: st.lists(CONTENT, min_size=2 * n, max_size=2 * n).map(
        lambda texts: [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    )
)
IMAGE = st.one_of(NAME, st.lists(NAME, max_size=3), st.none())
RECORD = st.builds(
    lambda key, turns, more: {key: turns, **more},
    st.sampled_from(["conversations", "conversations", "messages"]),
    st.one_of(USUAL, st.lists(TURN, max_size=5)),
    st.fixed_dictionaries({}, optional={"image": IMAGE, "images": IMAGE, "video": NAME, "id": st.integers()}),
)
