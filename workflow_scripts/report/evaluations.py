"""What the report tells about evaluations: tasks x experiments, each task in detail, examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pandas

from llava_ext.files import atomic_path
from workflow_scripts.config.question_fields import FieldsSpec
from workflow_scripts.evaluate.published import published_about
from workflow_scripts.evaluate.tasks import TASKS
from workflow_scripts.evaluate.tasks.task import Question
from workflow_scripts.io import UserError
from workflow_scripts.report.collect import Collected
from workflow_scripts.report.table import (
    ALL,
    CONDITIONS,
    Tasks,
    accuracy_rows,
    conditions_of,
    difference_rows,
    is_below_chance,
    is_near_chance,
    strata_of,
)

RIGHT = 0.5
"""A score from here on is shown as a right answer; shares exist with `vqa_accuracy`."""


def summary(tasks: Tasks, found: Collected, colours: Mapping[str, int]) -> dict[str, Any] | None:
    """The table of tasks x experiments; None without evaluations."""
    if not tasks:
        return None
    names = [name for name in colours if any(name in scores for scores in tasks.values())]
    baselines = {content["baseline"] for _, content in found.comparisons.values()}
    rows = [
        {"name": name, "cells": [_summary_cell(tasks[task].get(name), task, name, found) for task in tasks]}
        for name in names
    ]
    return {"tasks": list(tasks), "rows": rows, "baseline": ", ".join(sorted(baselines))}


def _summary_cell(
    scores: Mapping[str, Any] | None, task: str, name: str, found: Collected
) -> dict[str, Any] | None:
    """An experiment's whole result in a task: accuracy, difference to the baseline, PSI, floors."""
    if scores is None:
        return None
    floors = {
        label: scores["accuracy"][key][ALL]["value"]
        for key, label in CONDITIONS.items()
        if key != "normal" and key in scores["accuracy"]
    }
    compared = found.comparisons.get(name)
    return {
        "accuracy": scores["accuracy"]["normal"][ALL],
        "chance": scores["chance"].get(ALL),
        "no_chance": _why_no_chance(scores),
        "floors": floors,
        "psi": scores["psi"].get(ALL),
        "delta": compared[1]["tasks"].get(task, {}).get(ALL) if compared else None,
    }


def _odd(scores: Mapping[str, Any]) -> list[str]:
    """What should make one look at the answers."""
    found = [
        f"{CONDITIONS[condition]}: {cells[ALL][what]} {what}"
        for condition, cells in scores["accuracy"].items()
        for what in ("empty", "unparsed")
        if cells[ALL][what]
    ]
    return found + ["as is: below chance, so the metric may not read the answers"] * is_below_chance(scores)


def _why_no_chance(scores: Mapping[str, Any]) -> str:
    """Scores of earlier versions do not say it."""
    return str(scores.get("no_chance") or "not known")


def task_sections(tasks: Tasks, found: Collected, colours: Mapping[str, int]) -> list[dict[str, Any]]:
    """One section a task: table, figure and footnotes."""
    return [_task_section(task, scores, found, colours) for task, scores in tasks.items()]


def _task_section(
    task: str, scores: Mapping[str, Mapping[str, Any]], found: Collected, colours: Mapping[str, int]
) -> dict[str, Any]:
    from workflow_scripts.report import plots

    kinds, conditions = strata_of(scores), conditions_of(scores)
    first = next(iter(scores.values()))
    rows = [
        {
            "name": name,
            "index": colours[name],
            "accuracy": _shares(item),
            "cells": [_cell(item, kind, condition) for kind in kinds for condition in conditions],
            "psi": [item["psi"].get(kind) for kind in kinds],
            "whole_psi": item["psi"].get(ALL),
            "deltas": [_delta(found, name, task, kind) for kind in kinds],
            "odd": _odd(item),
        }
        for name, item in scores.items()
    ]
    chance = {kind: level for kind, level in first["chance"].items() if level is not None}
    label = f"{task}: accuracy by stratum and experiment; the table below has the same numbers"
    return {
        "task": task,
        "kinds": kinds,
        "conditions": [(name, CONDITIONS[name]) for name in conditions],
        "rows": rows,
        "chance": chance,
        "no_chance": _why_no_chance(first) if len(chance) < len(first["chance"]) else "",
        "own_metrics": _own_metrics(scores),
        "questions": {kind: cell["questions"] for kind, cell in first["accuracy"]["normal"].items()},
        "pictures": first["pictures"],
        "source": first["source"]["name"],
        "metric": first["scored"]["metric"],
        "harness": "{name} {version}".format(**first["harness"]),
        "confidence": first["statistics"]["confidence"],
        "permutations": first["asked"].get("conditions", {}).get("permuted", 1),
        "permute_seed": first["asked"].get("permute_seed", 0),
        "figure": plots.accuracy_figure(rows, kinds, chance, label),
        "published": _published(first["scored"].get("benchmark"), kinds),
    }


def _own_metrics(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """A task of lmms-eval's own metrics over all answers, and over guesses; None for other tasks."""
    found = {name: item["metrics"]["normal"]["0"] for name, item in scores.items() if item.get("metrics")}
    if not found:
        return None
    names = list(dict.fromkeys(metric for metrics in found.values() for metric in metrics))
    guessed = next(iter(scores.values())).get("guessed", {})
    rows = [{"name": name, "values": [metrics.get(key) for key in names]} for name, metrics in found.items()]
    chance = [guessed.get("metrics", {}).get(key) for key in names]
    return {"names": names, "rows": rows, "chance": chance, "draws": guessed.get("draws")}


def _published(benchmark: str | None, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """What others say about the task's benchmark, in the order of the register; shares as ours."""

    def share(value: float | None) -> float | None:
        return None if value is None else value / 100

    return [
        {
            "model": item.model,
            "value": item.value if item.unit else share(item.value),
            "unit": item.unit,
            "metric": item.metric,
            "permuted": share(item.permuted),
            "psi": share(item.psi),
            "strata": [share(item.strata.get(kind)) for kind in kinds],
            "harness": item.harness,
            "how": item.how,
        }
        for item in published_about(benchmark)
    ]


def _shares(item: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {
        condition: {kind: cell["value"] for kind, cell in cells.items()}
        for condition, cells in item["accuracy"].items()
    }


def _cell(item: Mapping[str, Any], kind: str, condition: str) -> dict[str, Any]:
    found = item["accuracy"].get(condition, {}).get(kind)
    guess = found is not None and is_near_chance(found, item["chance"].get(kind))
    return {"kind": kind, "condition": condition, "found": found, "guess": guess}


def _delta(found: Collected, name: str, task: str, kind: str) -> dict[str, Any] | None:
    compared = found.comparisons.get(name)
    return compared[1]["tasks"].get(task, {}).get(kind) if compared else None


def disagreements(tasks: Tasks, found: Collected) -> list[dict[str, Any]]:
    """Of each task: how often the experiments disagree, and some of those questions with all answers, drawn
    by the statistics' seed.
    """
    return [part for task, scores in tasks.items() if (part := _disagreement(task, scores, found))]


def _disagreement(
    task: str, scores: Mapping[str, Mapping[str, Any]], found: Collected
) -> dict[str, Any] | None:
    rows = {name: _answers(name, task, item, found) for name, item in scores.items()}
    rows = {name: table for name, table in rows.items() if table is not None}
    if len(rows) < 2:
        return None
    asked = {name: table.query("condition == 'normal'").set_index("question") for name, table in rows.items()}
    normal = pandas.DataFrame({name: table.score for name, table in asked.items()}).dropna()
    apart = normal.index[(normal >= RIGHT).nunique(axis=1) > 1]
    first = next(iter(scores.values()))
    number = min(len(first["examples"]), len(apart))
    random = numpy.random.default_rng(first["statistics"]["seed"])
    chosen = sorted(random.choice(len(apart), number, replace=False)) if number else []
    cards = [_question_card(task, str(apart[place]), rows) for place in chosen]
    pictures = _thumbnails(first, [card["image"] for card in cards], found)
    shown = [card | {"thumbnail": pictures.get(card["image"])} for card in cards]
    return {
        "task": task,
        "number": len(apart),
        "questions": len(normal),
        "cards": shown,
        "seed": first["statistics"]["seed"],
    }


def _answers(name: str, task: str, item: Mapping[str, Any], found: Collected) -> Any:
    """An experiment's rows with answers and scores, each question once a condition; None where they are
    gone.
    """
    home, paths = found.evaluations[name, task][0].parent, item.get("paths", {})
    files = [home / paths[key] for key in ("predictions", "scores") if key in paths]
    if len(files) < 2 or not all(file.is_file() for file in files):
        return None
    said, scored = map(pandas.read_parquet, files)
    keys = ["question", "condition", "seed"]
    return said.merge(scored[[*keys, "score"]], on=keys).query("seed == 0")


def _question_card(task: str, question: str, rows: Mapping[str, Any]) -> dict[str, Any]:
    """One question with every experiment's answers, in the form of the examples."""
    own = {name: table[table["question"] == question].set_index("condition") for name, table in rows.items()}
    row = next(iter(own.values())).loc["normal"]
    answers = {
        name: {
            condition: {"text": table.answer[condition], "right": table.score[condition] >= RIGHT}
            for condition in CONDITIONS
            if condition in table.index
        }
        for name, table in own.items()
    }
    asked = {"answer": row.right[0], "type": row.stratum}
    return {"task": task, "image": row.picture, "rows": {row.text: {"asked": asked, "answers": answers}}}


def example_cards(tasks: Tasks, found: Collected) -> list[dict[str, Any]]:
    """The example pictures of each task, each with every experiment's answers to its questions."""
    return [card for task, scores in tasks.items() for card in _task_cards(task, scores, found)]


def _task_cards(
    task: str, scores: Mapping[str, Mapping[str, Any]], found: Collected
) -> Iterator[dict[str, Any]]:
    cards: dict[str, dict[str, Any]] = {}
    for name, item in scores.items():
        for example in item["examples"]:
            card = cards.setdefault(example["image"], {"task": task, "image": example["image"], "rows": {}})
            for asked in example["questions"]:
                row = card["rows"].setdefault(asked["question"], {"asked": asked, "answers": {}})
                row["answers"][name] = {
                    condition: {"text": said["text"], "right": said["score"] >= RIGHT}
                    for condition in CONDITIONS
                    if (said := asked["answers"].get(condition))
                }
    pictures = _thumbnails(next(iter(scores.values())), list(cards), found)
    for image, card in cards.items():
        yield card | {"thumbnail": pictures.get(image)}


def _thumbnails(scores: Mapping[str, Any], images: Sequence[str], found: Collected) -> dict[str, str | None]:
    """The pictures, small; none where the source is no longer there."""
    from workflow_scripts.report.data import thumbnail

    source = found.sources.get(scores["source"]["name"])
    if source is None or not images:
        return {}
    asked = [Question(image, image, "", "", ()) for image in images]
    fields = scores["asked"].get("fields")
    columns = None if fields is None else FieldsSpec.model_validate(fields)
    try:
        with TASKS[scores["asked"]["kind"]].pictures(source[0], columns, asked) as picture:
            return {image: thumbnail(picture(image), 160) for image in images}
    except (UserError, OSError):
        return {}


def _published_rows(tasks: Tasks) -> list[dict[str, Any]]:
    """One row for each number of others, a stratum's too; in % where no other unit is said."""
    benchmarks = {
        task: item["scored"].get("benchmark") for task, scores in tasks.items() for item in scores.values()
    }
    return [
        {
            "task": task,
            "benchmark": benchmark,
            "model": item.model,
            "stratum": stratum,
            "value": value,
            "unit": item.unit or "%",
            "metric": item.metric,
            "permuted": item.permuted if stratum == ALL else None,
            "psi": item.psi if stratum == ALL else None,
            "how": item.how,
            **{key: getattr(item.harness, key) for key in ("settings", "source")},
            "harness": item.harness.name,
        }
        for task, benchmark in benchmarks.items()
        for item in published_about(benchmark)
        for stratum, value in {ALL: item.value, **item.strata}.items()
    ]


def write_tables(tasks: Tasks, found: Collected, folder: Path) -> None:
    """accuracy, differences and, where a task is a known benchmark, what others have published, each as CSV
    and parquet.
    """
    compared = {name: content for name, (_, content) in found.comparisons.items()}
    tables = {"accuracy": accuracy_rows(tasks), "differences": difference_rows(compared)}
    if published := _published_rows(tasks):
        tables["published"] = published
    for name, rows in tables.items():
        table = pandas.DataFrame(rows)
        with atomic_path(folder / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False)
        with atomic_path(folder / f"{name}.parquet") as temporary:
            table.to_parquet(temporary, index=False)
