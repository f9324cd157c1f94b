"""What counts as right, the only list of it: a function here and a line in `METRICS` are a new metric."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One way to score an answer.

    Attributes:
        score: (given, right answers, choices) to 1 for right, 0 for wrong, a share between them, or None
            where the answer can't be read, which counts as wrong and is counted apart. None in its place:
            a step of its own scores, in the environment that has lmms-eval.
        chance: (right answers and choices of each question) to the score of one who guesses; None where there
            is nothing to guess among.
        no_chance: why there is not.
    """

    name: str
    score: Callable[[str, Sequence[str], Sequence[str]], float | None] | None
    chance: Callable[[Sequence[tuple[Sequence[str], Sequence[str]]]], float | None]
    no_chance: str = ""


def normal_form(answer: str) -> str:
    """Without case, surrounding blanks and a final full stop; letters with accents written in one way."""
    return " ".join(unicodedata.normalize("NFC", answer).lower().split()).removesuffix(".")


# ---- exact match ----------------------------------------------------------------------------------------


def _exact(given: str, right: Sequence[str], choices: Sequence[str]) -> float:
    return float(normal_form(given) in {normal_form(answer) for answer in right})


def _one_of_the_answers(asked: Sequence[tuple[Sequence[str], Sequence[str]]]) -> float | None:
    answers = len({normal_form(right[0]) for right, _ in asked})
    return 1 / answers if answers > 1 else None


# ---- yes or no ------------------------------------------------------------------------------------------

_TRUTH = {"yes": "yes", "no": "no", "true": "yes", "false": "no"}


def _truth(text: str) -> str | None:
    word = re.match(r"\W*(\w+)", text.lower())
    return _TRUTH.get(word[1]) if word else None


def _yes_no(given: str, right: Sequence[str], choices: Sequence[str]) -> float | None:
    found = _truth(given)
    return None if found is None else float(found == _truth(right[0]))


# ---- the letter of a choice -----------------------------------------------------------------------------

_LETTER = re.compile(r"(?:.*\banswer\s*(?:is|:)\s*)?\(?([a-z])\)?\s*(?:[.:),]|$)", re.I | re.S)


def letter_of(text: str, choices: Sequence[str]) -> str | None:
    """`B`, `(B)`, `B. a dog`, `The answer is B`, or the text of a choice."""
    for place, choice in enumerate(choices):
        if normal_form(text) == normal_form(choice):
            return chr(ord("A") + place)
    found = _LETTER.match(text.strip())
    return found[1].upper() if found else None


def _choice(given: str, right: Sequence[str], choices: Sequence[str]) -> float | None:
    found, wanted = letter_of(given, choices), letter_of(right[0], choices)
    is_listed = wanted is not None and (not choices or ord(wanted) - ord("A") < len(choices))
    return None if found is None else float(is_listed and found == wanted)


def _one_of_the_choices(asked: Sequence[tuple[Sequence[str], Sequence[str]]]) -> float | None:
    letters = len({letter_of(right[0], choices) for right, choices in asked})
    if letters < 2 and not all(choices for _, choices in asked):
        return None
    return sum(1 / (len(choices) or letters) for _, choices in asked) / len(asked)


# ---- VQA ------------------------------------------------------------------------------------------------

_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS.split())}
_SHORT = (
    "ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how's i'd i'm i've"
    " isn't it'd it's mustn't she'd she's shouldn't that's there's they'd they're they've wasn't we've"
    " weren't what's where's who's won't wouldn't y'all you'd you'll you're you've"
)
_APOSTROPHES = {word.replace("'", ""): word for word in _SHORT.split()}


def vqa_form(answer: str) -> str:
    """An answer as the VQA challenge compares them: no articles and punctuation, digits for number words."""
    text = " ".join(answer.lower().split())
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)
    text = re.sub(r"[;/\[\]\"{}()=+\\_<>@`,?!-]", " ", text)
    words = [_NUMBERS.get(word, word) for word in text.split() if word not in ("a", "an", "the")]
    return " ".join(_APOSTROPHES.get(word, word) for word in words)


def _vqa(given: str, right: Sequence[str], choices: Sequence[str]) -> float:
    """Mean over all but one of the people: a third for each who said the same, at most 1."""
    said, mine = [vqa_form(answer) for answer in right], vqa_form(given)
    agree = said.count(mine)
    if len(said) < 2:
        return float(agree)
    shares = [min(1.0, (agree - (answer == mine)) / 3) for answer in said]
    return sum(shares) / len(shares)


ONE_ANSWER = "the same answer is right everywhere in a stratum"
METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact_match", _exact, _one_of_the_answers, ONE_ANSWER),
        Metric("yes_no", _yes_no, lambda asked: 0.5),
        Metric("choice_letter", _choice, _one_of_the_choices, ONE_ANSWER),
        Metric("vqa_accuracy", _vqa, lambda asked: None, "its questions are open: any words may be right"),
        Metric("lmms_eval", None, lambda asked: None),
    )
}


def why_never_right(metric: str, right: Sequence[str], choices: Sequence[str]) -> str:
    """What is wrong with a question to which no answer can be right: the metric can't read its right ones.
    Empty where one can.
    """
    score = METRICS[metric].score
    if score is None or any((score(answer, right, choices) or 0) > 0 for answer in right):
        return ""
    return (
        f"metric: {metric} can't read the right answer {right[0] if right else ''!r}, so no answer would be"
        " right; choose another metric, or say with fields.answer_words what it means"
    )
