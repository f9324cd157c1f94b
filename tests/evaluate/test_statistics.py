"""Intervals hold the truth as often as they say, and tests raise false alarms no oftener: on simulated
answers.
"""

import numpy as np
import pandas as pd
import pytest

from workflow_scripts.evaluate.statistics import (
    Settings,
    accuracy,
    detectable_difference,
    difference,
    holm,
    permutation_sensitivity,
)
from workflow_scripts.io import UserError

QUICK = Settings(resamples=300)
PICTURES, EACH = 120, 5


def questions(pictures=PICTURES, each=EACH):
    """Names of questions, ``each`` of them about each picture."""
    count = pictures * each
    return pd.DataFrame({"question": [f"q{i}" for i in range(count)], "picture": np.arange(count) // each})


def answered(rng, easiness, table=None):
    """Rows of 0 and 1 whose chance of 1 is ``easiness``: (pictures,) or (questions,)."""
    table = questions() if table is None else table
    chance = easiness if len(easiness) == len(table) else np.repeat(easiness, len(table) // len(easiness))
    return table.assign(score=(rng.random(len(table)) < chance).astype(float))


def share(found, trials=100):
    return sum(found(np.random.default_rng(seed)) for seed in range(trials)) / trials


@pytest.mark.slow
def test_an_interval_holds_the_truth_although_a_pictures_questions_stand_and_fall_together():
    def covered(rng):
        found = accuracy(answered(rng, rng.choice([0.05, 0.95], PICTURES)), QUICK)
        return found.low <= 0.5 <= found.high

    assert share(covered) >= 0.88


@pytest.mark.slow
def test_an_interval_that_takes_questions_for_independent_is_too_narrow():
    """What clustering is for: the same answers, each question a picture of its own."""

    def covered(rng):
        rows = answered(rng, rng.choice([0.05, 0.95], PICTURES))
        found = accuracy(rows.assign(picture=rows["question"]), QUICK)
        return found.low <= 0.5 <= found.high

    assert share(covered) < 0.8


@pytest.mark.slow
def test_equally_good_checkpoints_differ_significantly_in_about_5_percent():
    def alarm(rng):
        chance = rng.uniform(0.2, 0.9, PICTURES * EACH)
        return difference(answered(rng, chance), answered(rng, chance), Settings(resamples=9)).p < 0.05

    assert share(alarm) <= 0.1


@pytest.mark.slow
def test_the_interval_of_a_difference_holds_the_true_one():
    def covered(rng):
        easiness = rng.uniform(0.2, 0.7, PICTURES)
        found = difference(answered(rng, easiness + 0.1), answered(rng, easiness), QUICK).estimate
        return found.low <= 0.1 <= found.high

    assert share(covered) >= 0.88


@pytest.mark.slow
def test_shares_are_compared_by_flipping_signs():
    def alarm(rng):
        table, easiness = questions(), rng.uniform(0.2, 0.8, PICTURES * EACH)
        first, second = (table.assign(score=rng.binomial(3, easiness) / 3) for _ in range(2))
        return difference(first, second, Settings(resamples=99)).p < 0.05

    assert share(alarm, 60) <= 0.12
    rng = np.random.default_rng(1)
    low = questions().assign(score=rng.binomial(3, 0.4, PICTURES * EACH) / 3)
    high = questions().assign(score=rng.binomial(3, 0.7, PICTURES * EACH) / 3)
    assert difference(high, low, QUICK).p < 0.01


@pytest.mark.slow
def test_the_detectable_difference_is_detected_in_about_four_of_five():
    rng = np.random.default_rng(3)
    easiness = rng.uniform(0.3, 0.6, PICTURES)
    step = difference(answered(rng, easiness), answered(rng, easiness), QUICK).detectable

    def detected(rng):
        return difference(answered(rng, easiness + step), answered(rng, easiness), QUICK).estimate.low > 0

    assert 0.7 <= share(detected) <= 0.93
    assert np.isnan(detectable_difference(np.array([1.0]), np.array([1])))


@pytest.mark.slow
def test_the_permutation_index_and_its_interval():
    def covered(rng):
        normal = answered(rng, np.full(PICTURES, 0.8))
        seeds = [answered(rng, np.full(PICTURES, 0.6)) for _ in range(3)]
        found = permutation_sensitivity(normal, pd.concat(seeds), QUICK)
        return found.low <= 0.25 <= found.high

    assert share(covered) >= 0.88
    rows = questions(2, 2).assign(score=[1.0, 1.0, 1.0, 0.0])
    lost = rows.assign(score=[1.0, 0.0, 0.0, 0.0])
    assert permutation_sensitivity(rows, lost).value == pytest.approx(2 / 3)


@pytest.mark.slow
def test_holm_bounds_the_chance_of_any_false_alarm():
    def any_alarm(rng):
        return min(holm(rng.uniform(size=8))) < 0.05

    assert share(any_alarm, 60) <= 0.12
    assert holm([0.01, 0.04, 0.5]) == pytest.approx([0.03, 0.08, 0.5])
    assert holm([]) == []


def test_all_right_is_no_certainty():
    found = accuracy(questions(20, 1).assign(score=1.0))
    assert found.value == found.high == 1.0 and 0.7 < found.low < 0.95


def test_the_same_rows_give_the_same_numbers_in_any_order():
    rows = answered(np.random.default_rng(0), np.full(PICTURES, 0.5))
    assert accuracy(rows) == accuracy(rows.sample(frac=1, random_state=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.drop(columns="picture"), "no column 'picture'"),
        (lambda rows: rows.iloc[:0], "no rows"),
        (lambda rows: rows.assign(score=2.0), "'q0' has a score outside 0 to 1"),
        (lambda rows: rows.iloc[1:], "1 questions, e.g. 'q0', were asked of one of the two only"),
        (lambda rows: pd.concat([rows, rows.iloc[:1]]), "'q0' is there more than once"),
    ],
)
def test_unfit_rows_are_refused(change, message):
    rows = answered(np.random.default_rng(0), np.full(4, 0.5), questions(4, 2))
    with pytest.raises(UserError, match=message):
        difference(change(rows), rows)


def test_without_a_right_answer_there_is_no_index():
    rows = questions(3, 1).assign(score=0.0)
    with pytest.raises(UserError, match="no answer was right"):
        permutation_sensitivity(rows, rows)
