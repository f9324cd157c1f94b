"""What the finished demo must show. Looks at the demo's results in the repository, or in $DEMO_FOLDER.

Run after `make demo`; without results there is nothing to look at.
"""

import os
from pathlib import Path

import pytest

from tests.support.demo import load_json

FOLDER = Path(os.environ.get("DEMO_FOLDER", Path(__file__).parent.parent.parent))
SEVERAL_TOKENS = ("vanilla", "normalize", "normalize_multilayer", "compress_4")


@pytest.fixture(scope="module")
def accuracy():
    """Accuracies by experiment, condition and question type."""
    found = {}
    for path in FOLDER.glob("experiments/*/evaluation/shapes.json"):
        content = load_json(path)
        found[content["experiment"]] = {
            condition: {kind: cell["value"] for kind, cell in cells.items()}
            for condition, cells in content["accuracy"].items()
        }
    if not {*SEVERAL_TOKENS, "compress_1"} <= found.keys():
        pytest.skip(f"no results of the demo in {FOLDER}: run `make demo` first, or set DEMO_FOLDER")
    return found


@pytest.mark.parametrize("experiment", [*SEVERAL_TOKENS, "compress_1"])
def test_shape_and_colour_are_read_in_any_order_of_tokens(accuracy, experiment):
    found = accuracy[experiment]
    for kind in ("shape", "colour"):
        assert found["normal"][kind] > found["blank"][kind] + 0.4
        assert found["permuted"][kind] > found["normal"][kind] - 0.1


@pytest.mark.parametrize("experiment", SEVERAL_TOKENS)
def test_the_place_is_read_from_the_order_of_tokens(accuracy, experiment):
    found = accuracy[experiment]
    assert found["normal"]["where"] > found["blank"]["where"] + 0.3
    assert found["permuted"]["where"] < found["normal"]["where"] - 0.2


def test_one_token_has_no_order_and_no_place(accuracy):
    found = accuracy["compress_1"]
    assert found["permuted"] == found["normal"]
    assert found["normal"]["where"] < accuracy["vanilla"]["normal"]["where"] - 0.3


def test_intervals_differences_and_the_permutation_index_are_told(accuracy):
    folder = FOLDER / "experiments"
    psi = load_json(folder / "vanilla/evaluation/shapes.json")["psi"]
    assert psi["where"]["low"] > 0.5 and psi["shape"]["high"] < 0.2
    delta = load_json(folder / "compress_1/comparison.json")["tasks"]["shapes"]
    assert delta["where"]["significant"] and delta["where"]["high"] < -0.5
    assert abs(delta["colour"]["value"]) < 0.1
