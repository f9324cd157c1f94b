"""Says what a configuration would do: what is fetched, what disk it takes, which GPU jobs run.

    python -m workflow_scripts.plan --configfile config/llava-v1.5-7b.yaml [more.yaml ...]

Asks no server and reads no data: sizes come from the configuration, the rest from what lies in the working
folder.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from workflow_scripts.acquire.settled import Settled, is_commit
from workflow_scripts.command_line import command_line
from workflow_scripts.config.sources import HubSource
from workflow_scripts.io import user_errors
from workflow_scripts.manifests import origin_of
from workflow_scripts.plan import memory
from workflow_scripts.plan.answer_lines import answer_lines
from workflow_scripts.plan.answers import Prices
from workflow_scripts.plan.needs import GB, Item, disk_needs, items_of, missing_trackers
from workflow_scripts.plan.plan import Plan, read_plan
from workflow_scripts.plan.runs import Run
from workflow_scripts.plan.skipped import lines_of_others
from workflow_scripts.plan.source_keys import SOURCES, pinned
from workflow_scripts.plan.specs import plain
from workflow_scripts.plan.tokens import Speeds, hours_of, measured_speeds, tokens_of


@dataclass(frozen=True)
class Job:
    """One training."""

    run: Run
    experiments: list[str]
    gpus: str
    tokens: int | None
    hours: float | None
    is_measured: bool
    gpu_hours: float | None
    gpu_bytes: float | None
    finished: bool


def jobs_of(plan: Plan) -> list[Job]:
    """All trainings, stage 1 first."""
    speeds = measured_speeds(plan)
    return [_job(plan, run, speeds) for run in plan.trainings()]


def _job(plan: Plan, run: Run, speeds: Speeds) -> Job:
    compute = plan.compute(run.stage, run.name)
    count = compute.nodes * compute.gpus_per_node
    shape = f"{compute.nodes} x {compute.gpus_per_node} GPU" if count else f"{compute.nodes} x CPU"
    tokens = tokens_of(plan, run)
    hours, is_measured = hours_of(plan, run, tokens, speeds)
    total = hours * count if hours is not None else None
    used, finished = plan.used_by(run.stage, run.name), Path(run.manifest).is_file()
    needs = memory.needs_of(plan, run)
    peak = needs.peak if needs else None
    return Job(run, used, shape, tokens, hours, is_measured, total, peak, finished)


def describe_plan(plan: Plan, folder: Path | None = None) -> str:
    """The plan as text."""
    items = items_of(plan)
    lines = ["What this configuration needs", ""]
    jobs = jobs_of(plan)
    lines += _data_lines(items) + _disk_lines(plan, items, folder or Path.cwd()) + _job_lines(jobs)
    lines += (
        _moving_lines(plan)
        + answer_lines(plan, Prices(plan), _training_hours(jobs))
        + _adopted_lines(plan)
        + _chosen_lines(plan)
        + _memory_lines(plan)
    )
    lines += [f"  {line}" for line in lines_of_others(plan)]
    missing = missing_trackers(plan)
    return "\n".join([*lines, *(f"  NOT INSTALLED: {text}" for text in missing), *[""][: len(missing)]])


def _size(value: float | None) -> str:
    return "       ?" if value is None else f"{value / GB:8.2f}"


def _data_lines(items: Iterable[Item]) -> list[str]:
    items = list(items)
    if not items:
        return ["  Nothing is fetched: the data are made on this machine.", ""]
    width = max(len(item.name) for item in items)
    lines = [f"  {'data and models':<{width}}        GB"]
    lines += [f"  {item.name:<{width}}  {_size(item.total)}  {item.state}" for item in items]
    missing = sum(item.missing for item in items)
    unknown = sum(item.total is None and item.state == "to fetch" for item in items)
    more = f", and {unknown} of unknown size" if unknown else ""
    return [*lines, f"  {'to fetch in all':<{width}}  {_size(missing)}{more}", ""]


def _moving_lines(plan: Plan) -> list[str]:
    """The sources that are at a branch or a tag, with the commit that was fetched here."""
    lines = []
    for name in sorted(plan.used_sources()):
        spec = plan.config.sources[name]
        if isinstance(spec, HubSource) and not is_commit(spec.revision) and not all(map(pinned, spec.files)):
            commit = Settled(name, SOURCES).read(spec.repo, spec.revision)
            which = f"commit {commit} here" if commit else "the commit that it is at the first fetch"
            lines.append(
                f"  MOVES: sources.{name}.revision: {spec.revision!r} is no commit; taken as {which}"
            )
    return [*lines, *[""][: len(lines)]]


def _disk_lines(plan: Plan, items: Iterable[Item], folder: Path) -> list[str]:
    needs = disk_needs(plan, items)
    needed = sum(size for _, size in needs)
    free = shutil.disk_usage(folder).free
    if needed == 0:
        return [f"  disk: {free / GB:.1f} GB are free in {folder}", ""]
    lines = ["  disk                                       GB"]
    for what, value in (*needs, ("needed", needed), ("free here", free)):
        lines.append(f"  {what:<40} {value / GB:7.1f}")
    if needed > free:
        lines.append(
            f"  NOT ENOUGH: {(needed - free) / GB:.1f} GB are missing in {folder}; see --directory of"
            " Snakemake"
        )
    return [*lines, ""]


def _training_hours(jobs: Iterable[Job]) -> float:
    """GPU hours of the trainings that are to be done, as far as known."""
    return sum(job.gpu_hours for job in jobs if job.gpu_hours and not job.finished)


def _adopted_lines(plan: Plan) -> list[str]:
    """The experiments whose checkpoints are not trained here, with where they come from."""
    if not plan.adopted:
        return []
    width = max(map(len, plan.adopted))
    lines = ["  checkpoints that are not trained here"]
    for name, item in plan.adopted.items():
        done = "there" if Path(plan.run("export", name).manifest).is_file() else "to be made ready"
        origin = origin_of(plain(plan.config.models[item.checkpoint]))
        lines.append(f"  {name:<{width}}  {origin}, {done}")
    return [*lines, ""]


def _job_lines(jobs: list[Job]) -> list[str]:
    if not jobs:
        return ["  Nothing is trained.", ""]
    width = max(len(job.run.name) for job in jobs)
    sized = any(job.gpu_bytes is not None for job in jobs)
    title = "GB a GPU" if sized else ""
    lines = [f"  {'trainings':<{width + 10}}  jobs of      {title}  M tokens   hours   GPU h  for"]
    for job in jobs:
        used, name = ", ".join(job.experiments), f"{job.run.stage:<9} {job.run.name:<{width}}"
        size = _gigabytes(job.gpu_bytes) if sized else ""
        lines.append(f"  {name}  {job.gpus:<12}{size} {_millions(job.tokens)}{_hours(job)}  {used}")
    left = [job for job in jobs if not job.finished]
    gpu_hours = _training_hours(left)
    hours = sum(job.hours for job in left if job.hours)
    total = f", about {hours:.0f} hours one after the other" if hours else ""
    total += f", {gpu_hours:.0f} GPU hours" if gpu_hours else ""
    unknown = sum(job.hours is None for job in left)
    total += f" and what {unknown} of unknown length take" if total and unknown else ""
    lines.append(f"  {len(left)} of {len(jobs)} trainings are to be done{total}")
    if any(job.is_measured and not job.finished for job in jobs):
        lines.append("  * from the survey's tokens, at the speed of trainings that are finished here")
    return [*lines, ""]


def _gigabytes(size: float | None) -> str:
    return f"{'?' if size is None else format(size / GB, '.0f'):>9}"


def _chosen_lines(plan: Plan) -> list[str]:
    """One line a kind of job and stage for what `auto` has come to."""
    lines = [
        f"  compute.{name}, {stage}, gpu_gb: {spec.gpu_gb:g}: {memory.chosen(plan, stage, name)}"
        for (name, stage), spec in plan.kinds.items()
        if plan.config.compute[name].leaves_open and spec.gpu_gb
    ]
    return [*lines, *[""][: len(lines)]]


def _memory_lines(plan: Plan) -> list[str]:
    """One line a kind of job for trainings that do not fit on their GPUs."""
    found = dict[str, str]()
    for run in plan.trainings():
        problem = memory.problem_of(plan, run)
        if problem and not Path(run.manifest).is_file():
            name = plan.experiments[run.experiment].stage(run.stage).compute
            found.setdefault(name, f"  NOT ENOUGH: {problem}")
    return [*found.values(), *[""][: len(found)]]


def _millions(tokens: int | None) -> str:
    return f"{'?' if tokens is None else format(tokens / 1e6, '.2f'):>9}"


def _hours(job: Job) -> str:
    if job.finished:
        return f"{'done':>8}{'':>8}"
    if job.hours is None:
        return f"{'?':>8}{'?' if job.gpu_hours is not None else '':>8}"
    cost = f"{job.gpu_hours:8.1f}" if job.gpu_hours else f"{'':>8}"
    return f"{job.hours:7.1f}{'*' if job.is_measured else ' '}{cost}"


def is_dry_run(argv: Sequence[str]) -> bool:
    """True when Snakemake's command line asks for a dry run: it does not tell a Snakefile while it reads
    it.
    """
    return any(
        word in ("--dry-run", "--dryrun") or re.fullmatch(r"-[pqFfkt]*n[npqFfkt]*", word) is not None
        for word in argv
    )


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Prints the plan of a configuration."""
    parser = command_line("plan", __doc__)
    parser.add_argument("--configfile", nargs="+", type=Path, default=[Path("config/config.yaml")])
    print(describe_plan(read_plan(parser.parse_args(argv).configfile)))


if __name__ == "__main__":
    main()
