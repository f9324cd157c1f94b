"""What counts as right."""

import pytest

from workflow_scripts.evaluate.metrics import METRICS, vqa_form

CHOICES = ("a cat", "a dog", "a cow")


@pytest.mark.parametrize(
    ("metric", "given", "right", "choices", "expected"),
    [
        ("exact_match", "Top  Left.", ["top left"], (), 1),
        ("exact_match", "left", ["top left"], (), 0),
        ("exact_match", "grey", ["gray", "grey"], (), 1),
        ("yes_no", "Yes, there is.", ["yes"], (), 1),
        ("yes_no", "no", ["yes"], (), 0),
        ("yes_no", "True", ["yes"], (), 1),
        ("yes_no", "There is one", ["yes"], (), None),
        ("yes_no", "", ["yes"], (), None),
        ("yes_no", "nothing", ["no"], (), None),
        ("choice_letter", "B", ["B"], CHOICES, 1),
        ("choice_letter", "(b)", ["B"], CHOICES, 1),
        ("choice_letter", "B. a dog", ["a dog"], CHOICES, 1),
        ("choice_letter", "The answer is C.", ["B"], CHOICES, 0),
        ("choice_letter", "a dog", ["B"], CHOICES, 1),
        ("choice_letter", "a horse", ["A"], CHOICES, None),
        ("choice_letter", "", ["A"], CHOICES, None),
        ("vqa_accuracy", "two", ["2"] * 10, (), 1),
        ("vqa_accuracy", "2", ["2"] + ["3"] * 9, (), pytest.approx(0.3)),
        ("vqa_accuracy", "2", ["2"] * 3 + ["3"] * 7, (), pytest.approx(0.9)),
        ("vqa_accuracy", "2", ["3"] * 10, (), 0),
        ("vqa_accuracy", "The dog", ["dog"], (), 1),
    ],
)
def test_scores_worked_out_by_hand(metric, given, right, choices, expected):
    assert METRICS[metric].score(given, right, choices) == expected


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("A Dog.", "dog"),
        ("1,000", "1000"),
        ("3.5 miles", "3.5 miles"),
        ("red/green", "red green"),
        ("dont know", "don't know"),
        ("Ten", "10"),
    ],
)
def test_answers_in_the_form_of_the_challenge(text, form):
    assert vqa_form(text) == form


def test_chance_is_that_of_a_guess_among_the_answers():
    places = [(["top left"], ()), (["Top right"], ()), (["top left."], ()), (["bottom left"], ())]
    assert METRICS["exact_match"].chance(places) == pytest.approx(1 / 3)
    assert METRICS["yes_no"].chance([(["yes"], ())]) == 0.5
    asked = [(["A"], CHOICES), (["B"], CHOICES[:2])]
    assert METRICS["choice_letter"].chance(asked) == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert METRICS["choice_letter"].chance([(["A"], ()), (["D"], ())]) == 0.5


def test_nothing_is_guessed_where_one_answer_is_right_or_any_may_be():
    assert METRICS["exact_match"].chance([(["Red."], ()), (["red"], ())]) is None
    assert METRICS["choice_letter"].chance([(["A"], ()), (["A"], ())]) is None
    assert METRICS["choice_letter"].chance([(["A"], CHOICES)] * 2) == pytest.approx(1 / 3)
    assert METRICS["vqa_accuracy"].chance([(["a"] * 10, ())]) is None
    assert all(METRICS[name].no_chance for name in ("exact_match", "choice_letter", "vqa_accuracy"))


def test_an_accent_is_one_letter_or_two():
    assert METRICS["exact_match"].score("cafe\u0301", ["caf\u00e9"], ()) == 1
