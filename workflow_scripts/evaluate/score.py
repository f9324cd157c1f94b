"""Counts a task's right answers: accuracies with intervals, the position sensitivity index, what could not
be read.

    python -m workflow_scripts.evaluate.score --spec JSON --predictions runs/predict/P/manifest.json \\
        --manifest runs/score/S/manifest.json [--lmms runs/score/S/lmms_eval.json]

Reads rows only: no picture, no model, no GPU. Writes the manifest and, beside it, `scores.parquet`, the score
of each row, from which checkpoints are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field

from llava_ext.files import atomic_path
from workflow_scripts.command_line import command_line, read_spec
from workflow_scripts.config.base import StrictModel
from workflow_scripts.config.evaluation import TaskSpec
from workflow_scripts.evaluate.answers import TABLE
from workflow_scripts.evaluate.metrics import METRICS, why_never_right
from workflow_scripts.evaluate.questions import ALL
from workflow_scripts.evaluate.statistics import Estimate, Settings, accuracy, permutation_sensitivity
from workflow_scripts.io import UserError, digest, read_json, user_errors, write_json

SCORES = "scores.parquet"
SHOWN = 5


class ScoreSpec(StrictModel):
    """What the step has to know."""

    task: TaskSpec
    """The task's section."""
    confidence: float = 0.95
    """Of the intervals."""
    resamples: int = Field(default=2000, ge=100)
    """Bootstrap samples."""
    seed: int = 0
    """Of the bootstrap."""

    @property
    def settings(self) -> Settings:
        """For the statistics."""
        return Settings(self.confidence, self.resamples, self.seed)


def scored_rows(rows: pd.DataFrame, metric: str, lmms: Path | None = None) -> pd.DataFrame:
    """The rows with `score` (0 to 1), `empty` (nothing was said) and `unparsed` (it can't be read).

    ``lmms`` is what the step `evaluate.lmms.scores` wrote, for a metric that is not ours; its `chance` is
    that of each question.
    """
    score = METRICS[metric].score
    if score is None:
        elsewhere = scores_elsewhere(rows, lmms)
        rows = rows.assign(chance=elsewhere["chance"].to_list())
        found = elsewhere["score"].to_list()
    else:
        said = zip(rows["answer"], rows["right"], rows["choices"], strict=True)
        found = [score(given, list(right), list(choices)) for given, right, choices in said]
    return rows.assign(
        score=[0.0 if value is None else value for value in found],
        unparsed=[value is None for value in found],
        empty=[not text for text in rows["answer"]],
    )


def scores_elsewhere(rows: pd.DataFrame, lmms: Path | None) -> pd.DataFrame:
    """`score` and `chance` that lmms-eval gave to these rows, in their order.

    Raises:
        UserError: a row has not exactly one.
    """
    if lmms is None:
        raise UserError("metric: lmms_eval: --lmms is needed, the file of the step evaluate.lmms.scores")
    keys = ["question", "condition", "seed"]
    table = pd.read_parquet(lmms.parent / read_json(lmms)["table"]).set_index(keys)
    asked = pd.MultiIndex.from_frame(rows[keys])
    if not table.index.is_unique or set(table.index) != set(asked):
        raise UserError(f"{lmms}: has scores of {len(table)} answers, but {len(asked)} were given")
    if "chance" not in table:
        raise UserError(f"{lmms}: is of an earlier version of this workflow; remove it, and it is made anew")
    return table.loc[asked, ["score", "chance"]]


def check_rows(rows: pd.DataFrame, spec: TaskSpec, name: str) -> None:
    """Raises UserError for a wrong number of questions, and for too many empty or unreadable answers."""
    normal = rows[rows["condition"] == "normal"]
    where = f"evaluation.tasks.{name}"
    if spec.expected_questions not in (None, len(normal)):
        raise UserError(
            f"{where}.expected_questions: {spec.expected_questions}, but {len(normal)} questions were asked;"
            " correct the number or the source"
        )
    for question, right, choices in zip(normal["question"], normal["right"], normal["choices"], strict=True):
        if found := why_never_right(spec.metric, list(right), list(choices)):
            raise UserError(f"{where}, question {question}: {found}")
    unread = normal["unparsed"] & ~normal["empty"]
    for key, bad, what in (
        ("max_empty_share", normal["empty"], "are empty"),
        ("max_unparsed_share", unread, f"can't be read by metric: {spec.metric}"),
    ):
        if bad.mean() > getattr(spec, key):
            shown = "; ".join(
                f"{row.text!r:.80} -> {row.raw!r:.60}" for row in normal[bad].head(SHOWN).itertuples()
            )
            raise UserError(
                f"{where}: {bad.sum()} of {len(normal)} answers {what}, more than {key}:"
                f" {getattr(spec, key)}; for example: {shown}; change the prompt, the metric or {key}"
            )


def by_stratum(
    rows: pd.DataFrame, count: Callable[[pd.DataFrame], dict[str, Any] | None]
) -> dict[str, dict[str, Any] | None]:
    """``count`` of all rows and of each stratum's, in the order of the questions."""
    strata = list(dict.fromkeys(rows["stratum"]))
    parts = {ALL: rows, **{name: rows[rows["stratum"] == name] for name in strata if name != ALL}}
    return {name: count(part) for name, part in parts.items()}


def _once(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a question: the mean of its scores where it was asked with several seeds."""
    return rows.groupby(["question", "picture"], sort=False)["score"].mean().reset_index()


def _estimate(found: Estimate) -> dict[str, Any]:
    return {
        key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(found).items()
    }


def accuracies(rows: pd.DataFrame, settings: Settings) -> dict[str, dict[str, Any]]:
    """By condition and stratum: accuracy with its interval, and how many answers were empty or unreadable."""

    def count(part: pd.DataFrame) -> dict[str, Any]:
        found = _estimate(accuracy(_once(part), settings))
        return found | {"empty": int(part["empty"].sum()), "unparsed": int(part["unparsed"].sum())}

    conditions = list(dict.fromkeys(rows["condition"]))
    return {name: by_stratum(rows[rows["condition"] == name], count) for name in conditions}


def permutation_indices(rows: pd.DataFrame, settings: Settings) -> dict[str, dict[str, Any] | None]:
    """PSI by stratum; None where no answer is right, so that nothing can be lost. Empty without permuted
    rows.
    """
    if not (rows["condition"] == "permuted").any():
        return {}

    def count(part: pd.DataFrame) -> dict[str, Any] | None:
        normal = part[part["condition"] == "normal"]
        if not normal["score"].sum():
            return None
        return _estimate(permutation_sensitivity(normal, part[part["condition"] == "permuted"], settings))

    return by_stratum(rows, count)


def chance_levels(rows: pd.DataFrame, metric: str) -> dict[str, float | None]:
    """By stratum: the score of one who guesses among the answers of that stratum, or among each question's
    options; None where there is nothing to guess among.
    """
    normal = rows[rows["condition"] == "normal"]
    found = {str(name): _chance(part, metric) for name, part in normal.groupby("stratum", sort=False)}
    known = [(level, (normal["stratum"] == name).sum()) for name, level in found.items() if level is not None]
    whole = sum(level * count for level, count in known) / len(normal) if len(known) == len(found) else None
    return {ALL: None if whole is None else round(float(whole), 4)} | found


def _chance(part: pd.DataFrame, metric: str) -> float | None:
    if "chance" in part:
        level = float(part["chance"].mean()) if part["chance"].notna().all() else None
    else:
        asked = [(list(r), list(c)) for r, c in zip(part["right"], part["choices"], strict=True)]
        level = METRICS[metric].chance(asked)
    return None if level is None else round(level, 4)


def examples(rows: pd.DataFrame, number: int) -> list[dict[str, Any]]:
    """Some pictures with what was asked and answered; chosen by their names alone, so the same for every
    checkpoint.
    """
    first = rows[rows["seed"] == 0]
    kinds: dict[tuple[str, ...], list[str]] = {}
    asked = first[first["condition"] == "normal"].groupby("picture", sort=False)["stratum"]
    for picture, strata in asked:
        kinds.setdefault(tuple(strata), []).append(str(picture))
    # One picture for each set of strata in turn, so that rare sets are shown too.
    queues = sorted((sorted(found, key=digest) for found in kinds.values()), key=lambda found: -len(found))
    chosen = [queue[i] for i in range(number) for queue in queues if i < len(queue)][:number]
    return [{"image": name, "questions": _answers_about(first[first["picture"] == name])} for name in chosen]


def _answers_about(rows: pd.DataFrame) -> list[dict[str, Any]]:
    found = []
    for question, part in rows.groupby("question", sort=False):
        row = part.iloc[0]
        said = zip(part["condition"], part["answer"], part["score"], strict=True)
        answers = {name: {"text": text, "score": float(value)} for name, text, value in said}
        about = {"question": row["text"], "answer": row["right"][0], "type": row["stratum"]}
        found.append({"name": str(question), **about, "answers": answers})
    return found


def score(spec: ScoreSpec, predictions: Path, manifest: Path, lmms: Path | None = None) -> dict[str, Any]:
    """Scores the rows and writes the manifest."""
    said = read_json(predictions)
    rows = scored_rows(pd.read_parquet(predictions.parent / said["folder"] / TABLE), spec.task.metric, lmms)
    check_rows(rows, spec.task, said["task"])
    kept = [
        "question",
        "question_digest",
        "picture",
        "stratum",
        "condition",
        "seed",
        "score",
        "empty",
        "unparsed",
    ]
    manifest.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(manifest.with_name(SCORES)) as temporary:
        rows[kept].to_parquet(temporary, index=False)
    chance = chance_levels(rows, spec.task.metric)
    result = {
        **{key: said[key] for key in ("task", "checkpoint", "interventions", "source", "harness", "asked")},
        "run": manifest.parent.name,
        "predictions": {"run": said["run"], "folder": said["folder"], "digest": said["digest"]},
        "scored": spec.task.scored() | {"metric": spec.task.metric},
        "statistics": {key: getattr(spec, key) for key in ("confidence", "resamples", "seed")},
        "questions": said["questions"],
        "pictures": said["pictures"],
        "strata": list(dict.fromkeys(rows["stratum"])),
        "accuracy": accuracies(rows, spec.settings),
        "psi": permutation_indices(rows, spec.settings),
        "chance": chance,
        "no_chance": METRICS[spec.task.metric].no_chance if None in chance.values() else "",
        "examples": examples(rows, spec.task.examples),
    }
    if lmms is not None:
        theirs = read_json(lmms)
        result |= {key: theirs[key] for key in ("lmms_eval", "metrics")}
        result |= {"guessed": theirs["chance"], "no_chance": theirs["chance"]["reason"]}
    write_json(manifest, result)
    return result


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Scores one checkpoint's answers to one task."""
    paths = {
        "predictions": "the manifest of the predictions",
        "manifest": "the manifest of the scores, to be written",
    }
    texts = {"spec": "the task's section and the settings of the statistics, as JSON"}
    parser = command_line("evaluate.score", __doc__, texts, paths)
    parser.add_argument("--lmms", nargs="*", type=Path, default=[], help="the scores that lmms-eval gave")
    options = parser.parse_args(argv)
    lmms = options.lmms[0] if options.lmms else None
    result = score(read_spec(ScoreSpec, options.spec), options.predictions, options.manifest, lmms)
    for condition, found in result["accuracy"].items():
        cells = "  ".join(f"{kind} {100 * item['value']:5.1f}" for kind, item in found.items())
        print(f"{condition:<9} {cells}", flush=True)


if __name__ == "__main__":
    main()
