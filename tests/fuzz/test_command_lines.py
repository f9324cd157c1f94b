"""Command lines of the training at random: each is taken, or refused in a message that names the flag."""

import os

import pytest
from hypothesis import strategies as st

from llava_ext.errors import TrainingError
from llava_ext.training import console
from llava_ext.training.arguments import make_parser, parse
from tests.support.fuzzing import tries

# What talks to others, or asks for the help.
LEFT_OUT = {"help", "deepspeed", "push_to_hub", "hub_token", "local_rank"}
ACTIONS = {
    option: action
    for action in make_parser()._actions
    for option in action.option_strings
    if option.startswith("--") and action.dest not in LEFT_OUT
}
JUNK = st.sampled_from(
    [
        "",
        "-1",
        "0",
        "1",
        "3",
        "1e9",
        "nan",
        "inf",
        "None",
        "True",
        "False",
        "0.5",
        "x",
        "é",
        "{",
        "[1,2]",
        "1,2",
    ]
)


@st.composite
def flag(draw):
    """A flag with no value, one of its own choices, or something else."""
    name = draw(st.sampled_from(sorted(ACTIONS)))
    choices = ACTIONS[name].choices
    values = st.sampled_from([str(choice) for choice in choices]) | JUNK if choices else JUNK
    return [name, *draw(st.lists(values, max_size=2) | values.map(lambda value: [value]))]


@pytest.fixture
def base(tmp_path):
    (tmp_path / "data.json").write_text("[]")
    (tmp_path / "llm").mkdir()
    return [
        "--model_name_or_path", str(tmp_path / "llm"), "--vision_tower", str(tmp_path / "llm"),
        "--data_path", str(tmp_path / "data.json"), "--output_dir", str(tmp_path / "out"),
        "--use_cpu", "True",
    ]  # fmt: skip


@tries(60, 120, flags=st.lists(flag(), min_size=1, max_size=4))
def test_a_command_line_is_taken_or_refused_by_a_message(base, monkeypatch, tmp_path, flags):
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    try:
        arguments = parse([*base, *(word for words in flags for word in words)])
        assert arguments.training.output_dir
    except (TrainingError, ValueError) as error:
        assert console.message(error), f"not a message of ours: {error!r}"
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_every_flag_can_be_tried():
    assert len(ACTIONS) > 150
