"""What others have published about benchmarks, to stand beside our own numbers: a register with sources.

Made with other harnesses, prompts and graders, so never compared by a test, only shown. What could be read in
a secondary source alone says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Harness:
    """How a group of numbers was made, and where it stands."""

    name: str
    settings: str
    source: str


@dataclass(frozen=True)
class Published:
    """One model's numbers on one benchmark, in % where ``unit`` does not say otherwise.

    Attributes:
        permuted: with the vision tokens in a random order.
        psi: the position sensitivity index.
        strata: by the names that our own tasks give them.
        how: what is particular to this number: the split, the grader.
        metric: what the number is where it is no accuracy, as ours are.
    """

    benchmark: str
    model: str
    harness: Harness
    value: float | None = None
    permuted: float | None = None
    psi: float | None = None
    how: str = ""
    unit: str = ""
    metric: str = ""
    strata: Mapping[str, float] = field(default_factory=dict)


_LLAVA = Harness("LLaVA's own scripts", "greedy, batch 1", "LLaVA-1.5 (arXiv 2310.03744) and its model list")
_PAPER = Harness(
    "the paper's own scripts",
    "sampled at temperature 0.2, one permutation without a seed",
    "arXiv 2503.17349, by notes on it; settings by its published code",
)
_NORM, _MULTILAYER = (f"LLaVA-1.5-7B + {name}" for name in ("Norm", "Norm + Multilayer"))
_JUDGED = "graded by a paid judge"


def _official(benchmark: str, value: float, how: str = "", *, unit: str = "", metric: str = "") -> Published:
    return Published(benchmark, "LLaVA-1.5-7B", _LLAVA, value, how=how, unit=unit, metric=metric)


def _paper(
    benchmark: str, values: tuple[float, float], psi: tuple[float, float, float], how: str = ""
) -> tuple[Published, ...]:
    """The baseline's accuracy as it is and permuted; PSI of the baseline and of the two variants."""
    base = Published(benchmark, "LLaVA-1.5-7B", _PAPER, *values, psi=psi[0], how=how)
    others = zip((_NORM, _MULTILAYER), psi[1:], strict=True)
    return base, *(Published(benchmark, name, _PAPER, psi=value, how=how) for name, value in others)


def _two_d(model: str, value: float, psi: float, strata: tuple[float, ...]) -> Published:
    names = ("color", "shape", "shape_color")
    kinds = [f"{name}_{kind}" for name in names for kind in ("absolute", "relative")]
    found = dict(zip(kinds, strata, strict=True))
    return Published("2ds", model, _PAPER, value, psi=psi, how=_JUDGED, strata=found)


PUBLISHED: tuple[Published, ...] = (
    _official("vqav2", 78.5, "test-dev"),
    *_paper("vqav2", (78.20, 77.35), (1.09, 2.03, 2.08)),
    _official(
        "pope", 85.9, "mean over the random (2,910 questions), popular and adversarial ones", metric="F1"
    ),
    *_paper("pope", (87.30, 87.10), (0.34, 0.35, 0.46), "the 3,000 popular questions only"),
    _official("gqa", 62.0, "test-dev, balanced"),
    *_paper("gqa", (61.36, 58.62), (4.47, 6.10, 5.64), "exact match without case and final point"),
    *_paper("cv_bench_2d", (56.59, 56.26), (0.57, 11.31, 9.72), _JUDGED),
    _two_d("LLaVA-1.5-7B", 56.63, 41.07, (79.6, 37.0, 78.6, 34.4, 70.8, 39.4)),
    _two_d(_NORM, 59.30, 61.21, (88.0, 42.4, 79.0, 32.8, 71.8, 41.8)),
    _two_d(_MULTILAYER, 64.80, 54.21, (87.8, 47.2, 82.2, 40.8, 80.2, 50.6)),
    _official("vizwiz", 50.0),
    _official("scienceqa_img", 66.8),
    _official("textvqa", 58.2, "OCR tokens in the prompt"),
    _official("mme", 1510.7, "the ten categories of perception", unit="points", metric="perception score"),
    _official("mmbench", 64.3, "dev, graded by the benchmark's server"),
    _official("seed", 58.6, "about pictures and about frames of films"),
    _official("llava_w", 65.4, _JUDGED, unit="points", metric="share of the judge's grade"),
    _official("mm_vet", 31.1, _JUDGED, unit="points", metric="judge's grade"),
)
BENCHMARKS = tuple(dict.fromkeys(item.benchmark for item in PUBLISHED))


def published_about(benchmark: str | None) -> list[Published]:
    """What others have published about a benchmark; nothing for a task that is none of them."""
    return [item for item in PUBLISHED if item.benchmark == benchmark]
