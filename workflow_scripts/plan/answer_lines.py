"""What the plan says about answers and diagnoses: how many, and how many hours they take."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llava_ext.flops import TERA
from workflow_scripts.evaluate.conditions import conditions_of
from workflow_scripts.plan.answers import GPU_FLOPS, Cost, Prices, answers_of, hours, questions_of
from workflow_scripts.plan.plan import Plan

MINUTE_S = 60


def answer_lines(plan: Plan, prices: Prices, training_hours: float) -> list[str]:
    """A line a task, one for all diagnoses, and what all GPU jobs take together.

    Args:
        training_hours: GPU hours of the trainings that are to be done.
    """
    if not plan.evaluations:
        return []
    answers, diagnoses = prices.predictions(), prices.diagnoses()
    on_gpu = any(cost.on_gpu for cost in answers)
    lines = [*_table(plan, answers, on_gpu), *_diagnosis_lines(plan, diagnoses, on_gpu)]
    lines += _sums([*answers, *diagnoses], on_gpu, training_hours) + _long_jobs(plan, answers)
    return [*lines, ""]


def _table(plan: Plan, costs: Sequence[Cost], on_gpu: bool) -> list[str]:
    tasks = list(dict.fromkeys(item.task for item in plan.evaluations.values()))
    width = max(map(len, tasks))
    title = "GPU h" if on_gpu else "hours"
    lines = [f"  {'tasks':<{width}}  questions  conditions  checkpoints      answers  {title:>7}"]
    for task in tasks:
        checkpoints = sum(item.task == task for item in plan.evaluations.values())
        conditions = len(conditions_of(plan.task_spec(task).conditions))
        answers = answers_of(plan, task)
        total = "?" if answers is None else f"{answers * checkpoints:,}"
        mine = _hours([cost for cost in costs if cost.run.task == task])
        lines.append(
            f"  {task:<{width}}  {questions_of(plan, task) or '?':>9}  {conditions:>10}  {checkpoints:>11}"
            f"  {total:>11}  {mine:>8}".rstrip()
        )
    return lines


def _hours(costs: Sequence[Cost]) -> str:
    """Hours of the runs that are to be done, with a star where all were computed from what was seen here."""
    if all(cost.finished for cost in costs):
        return "done "
    known, unknown = hours(costs)
    left = [cost for cost in costs if not cost.finished]
    if unknown == len(left):
        return "? "
    star = "*" if all(cost.is_measured for cost in left) else " "
    return f"{'>' if unknown else ''}{known:.1f}{star}"


def _diagnosis_lines(plan: Plan, costs: Sequence[Cost], on_gpu: bool) -> list[str]:
    if not costs or plan.config.diagnostics is None:
        return []
    pictures, unit = plan.config.diagnostics.pictures, "GPU hours" if on_gpu else "hours"
    found = _hours(costs).strip()
    took = found if found == "done" else f"{found} {unit}"
    return [f"  {len(costs)} diagnoses of up to {pictures} pictures: {took}"]


def _sums(costs: Sequence[Cost], on_gpu: bool, training_hours: float) -> list[str]:
    """What is left of answers and diagnoses, with the trainings, and where the numbers are from."""
    left = [cost for cost in costs if not cost.finished]
    known, unknown = hours(left)
    if not known:
        return []
    unit = "GPU hours" if on_gpu else "hours"
    more = f" and what {unknown} of unknown length take" if unknown else ""
    lines = [f"  answers and diagnoses that are to be done take about {known:.1f} {unit}{more}"]
    if on_gpu and training_hours:
        lines.append(f"  in all about {training_hours + known:.0f} GPU hours{more}")
    if any(cost.is_measured for cost in left):
        lines.append("  * at the pace of answers that were given here")
    if any(cost.seconds is not None and not cost.is_measured for cost in left):
        lines.append(
            f"  assumed until the first answers are there: {GPU_FLOPS / TERA:.0f} TFLOP/s on a GPU (or what"
            " trainings reached here), answers as long as max_new_tokens"
        )
    return lines


def _long_jobs(plan: Plan, costs: Sequence[Cost]) -> list[str]:
    """Tasks whose jobs do not end in their time limit: they go on in the next attempt, of which there are
    few.
    """
    longest: dict[str, float] = {}
    for cost in costs:
        if cost.left:
            longest[cost.run.task] = max(longest.get(cost.run.task, 0.0), cost.left)
    lines = []
    for task, seconds in longest.items():
        spec = plan.task_spec(task)
        limit = spec.runtime_min * MINUTE_S
        if (one := seconds / spec.shards) > limit:
            lines.append(
                f"  LONG: evaluation.tasks.{task}: a job takes about {one / 3600:.1f} hours,"
                f" runtime_min is {spec.runtime_min}; shards: {math.ceil(seconds / limit)} would fit"
            )
    return lines
