"""Numbers that one can trust: accuracies with intervals, paired differences, the position sensitivity
index, power.

Everything here works on *rows*, a table with one row a question, as predictions are stored:

    question   names the question, the same for every checkpoint
    picture    the picture it asks about; questions about one picture are not independent: it is the cluster
    score      1 for a right answer, 0 for a wrong one, or a share between them (VQAv2)

Intervals are percentile intervals of a bootstrap over pictures (``scipy.stats.bootstrap``), tests are
McNemar's exact test (``statsmodels``) or, where scores are shares, a sign-flip permutation test over
pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, permutation_test
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

from workflow_scripts.io import UserError

COLUMNS = ("question", "picture", "score")


@dataclass(frozen=True)
class Settings:
    """How intervals and tests are made.

    Attributes:
        confidence: share of intervals that hold the true value.
        resamples: bootstrap samples, and permutations of the sign-flip test.
        seed: of both, so that a table can be made again.
    """

    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Estimate:
    """A number with its interval. ``questions`` and ``pictures`` say from how many it comes."""

    value: float
    low: float
    high: float
    questions: int
    pictures: int


@dataclass(frozen=True)
class Difference:
    """A checkpoint against a baseline on the same questions.

    Attributes:
        estimate: mean score of the checkpoint minus the baseline's, paired by question.
        p: of the hypothesis that they are equally good.
        detectable: the smallest difference that these questions would show in four of five cases at 5 %.
    """

    estimate: Estimate
    p: float
    detectable: float


def accuracy(rows: pd.DataFrame, settings: Settings | None = None) -> Estimate:
    """Mean score of all questions, with a bootstrap interval clustered by picture."""
    checked = _checked(rows, "rows")
    clusters = checked.groupby("picture")["score"].agg(["sum", "count"])
    return _ratio(clusters["sum"].to_numpy(), clusters["count"].to_numpy(), len(checked), settings)


def difference(rows: pd.DataFrame, baseline: pd.DataFrame, settings: Settings | None = None) -> Difference:
    """The checkpoint of ``rows`` against the one of ``baseline``, paired by question.

    Raises:
        UserError: the two were not asked the same questions.
    """
    chosen = settings or Settings()
    paired = _paired(rows, baseline)
    clusters = paired.groupby("picture")["delta"].agg(["sum", "count"])
    sums, sizes = clusters["sum"].to_numpy(), clusters["count"].to_numpy()
    estimate = _ratio(sums, sizes, len(paired), chosen, bounds=(-1.0, 1.0))
    return Difference(estimate, _p_value(paired, sums, chosen), detectable_difference(sums, sizes))


def permutation_sensitivity(
    normal: pd.DataFrame, permuted: pd.DataFrame, settings: Settings | None = None
) -> Estimate:
    """PSI = (accuracy - accuracy with permuted vision tokens) / accuracy (arXiv 2503.17349), with its
    interval.

    Args:
        permuted: may hold each question several times, once a seed; the mean of a question's scores counts.

    Raises:
        UserError: other questions, or no right answer without permutation, so that there is nothing to lose.
    """
    once = permuted.groupby(["question", "picture"])["score"].mean().reset_index()
    paired = _paired(normal, once)
    clusters = paired.groupby("picture")[["delta", "score"]].sum()
    lost, right = clusters["delta"].to_numpy(), clusters["score"].to_numpy()
    if not right.sum():
        raise UserError("PSI: no answer was right without permutation, so it is not defined for these rows")
    return _ratio(lost, right, len(paired), settings, bounds=(-np.inf, 1.0))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tasks, adjusted so that 5 % is the chance of *any* false alarm among them
    (Holm).
    """
    if not len(p_values):
        return []
    return [float(value) for value in multipletests(p_values, method="holm")[1]]


def detectable_difference(
    sums: np.ndarray, sizes: np.ndarray, alpha: float = 0.05, power: float = 0.8
) -> float:
    """The smallest mean difference that a paired test over these pictures finds with the given power.

    Args:
        sums: (pictures,), summed differences of each picture's questions.
        sizes: (pictures,), number of questions of each picture.
    """
    if len(sums) < 3:
        return float("nan")
    spread = float(np.std(sums - sizes * sums.sum() / sizes.sum(), ddof=1)) / float(sizes.mean())
    return _detectable_effect(len(sums), alpha, power) * spread


@lru_cache
def _detectable_effect(pictures: int, alpha: float, power: float) -> float:
    """In standard deviations; the equation is solved once for a number of pictures."""
    found = TTestPower().solve_power(nobs=pictures, alpha=alpha, power=power, alternative="two-sided")
    return float(np.squeeze(found))


# ---- the parts ------------------------------------------------------------------------------------------


def _checked(rows: pd.DataFrame, what: str) -> pd.DataFrame:
    missing = [name for name in COLUMNS if name not in rows]
    if missing:
        raise UserError(f"{what}: no column {missing[0]!r}; expected are {', '.join(COLUMNS)}")
    if not len(rows):
        raise UserError(f"{what}: no rows, so there is nothing to count")
    scores = rows["score"].to_numpy(dtype=float)
    if not ((scores >= 0) & (scores <= 1)).all():
        worst = rows.loc[~rows["score"].between(0, 1), "question"].iloc[0]
        raise UserError(f"{what}: question {worst!r} has a score outside 0 to 1; the metric must give shares")
    return rows


def _paired(rows: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Both scores of each question and ``delta``, the first minus the second."""
    first, second = _checked(rows, "rows"), _checked(other, "the rows to compare with")
    for table, what in ((first, "rows"), (second, "the rows to compare with")):
        again = table["question"][table["question"].duplicated()]
        if len(again):
            raise UserError(f"{what}: question {again.iloc[0]!r} is there more than once")
    alone = set(first["question"]) ^ set(second["question"])
    if alone:
        raise UserError(
            f"{len(alone)} questions, e.g. {min(alone)!r}, were asked of one of the two only; "
            "a paired comparison needs the same task, limit and source: predict again"
        )
    paired = first.merge(second[["question", "score"]], on="question", suffixes=("", "_other"))
    return paired.assign(delta=paired["score"] - paired["score_other"])


def _ratio(
    tops: np.ndarray,
    bottoms: np.ndarray,
    questions: int,
    settings: Settings | None,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Estimate:
    """Sum of ``tops`` over sum of ``bottoms``, both (pictures,), resampled together by picture."""
    chosen = settings or Settings()
    value, pictures = float(tops.sum() / bottoms.sum()), len(tops)
    shares = tops[bottoms > 0] / bottoms[bottoms > 0]
    if pictures < 2 or np.ptp(shares) == 0:
        low, high = _unanimous(value, pictures, chosen.confidence, bounds)
        return Estimate(value, low, high, questions, pictures)

    def statistic(tops: np.ndarray, bottoms: np.ndarray, axis: int) -> Any:
        totals = bottoms.sum(axis=axis)
        return tops.sum(axis=axis) / np.where(totals == 0, np.nan, totals)

    found = bootstrap(
        (tops, bottoms),
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=chosen.resamples,
        batch=max(1, 4_000_000 // pictures),
        confidence_level=chosen.confidence,
        method="percentile",
        rng=np.random.default_rng(chosen.seed),
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high), questions, pictures)


def _unanimous(
    value: float, pictures: int, confidence: float, bounds: tuple[float, float]
) -> tuple[float, float]:
    """The interval where all pictures agree, so that resampling shows no spread: Wilson's for their
    number.
    """
    low, _ = proportion_confint(pictures, pictures, alpha=1 - confidence, method="wilson")
    slack = 1.0 - float(low)
    return max(bounds[0], value - slack), min(bounds[1], value + slack)


def _p_value(paired: pd.DataFrame, sums: np.ndarray, settings: Settings) -> float:
    whole = paired[["score", "score_other"]].isin([0, 1]).all(axis=None)
    test: Callable[..., float] = _mcnemar if whole else _sign_flips
    return test(paired, sums, settings)


def _mcnemar(paired: pd.DataFrame, sums: np.ndarray, settings: Settings) -> float:
    """McNemar's exact test of the questions that only one of the two answered rightly."""
    won = int((paired["delta"] > 0).sum())
    lost = int((paired["delta"] < 0).sum())
    if won + lost == 0:
        return 1.0
    return float(mcnemar([[0, won], [lost, 0]], exact=True).pvalue)


def _sign_flips(paired: pd.DataFrame, sums: np.ndarray, settings: Settings) -> float:
    """Permutation test for shares: under the hypothesis each picture's difference has a random sign."""
    if not np.any(sums):
        return 1.0
    found = permutation_test(
        (sums,),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=settings.resamples,
        batch=max(1, 4_000_000 // len(sums)),
        rng=np.random.default_rng(settings.seed),
    )
    return float(found.pvalue)
