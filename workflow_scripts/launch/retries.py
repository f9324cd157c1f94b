"""Spares jobs the attempts that would end as the last one did.

Snakemake's `retries` is one number for a rule. Whether a failed job is started again is asked for each job
right behind its executor's `handle_job_error`, and every start goes through the executor's `run_jobs`: both
belong to the interface that all executors implement, and both are called by the main Snakemake, on the login
node. So a training that will fail again is neither submitted nor waits in a queue to say so. Of other steps
the last line of the log says whether another attempt would meet the same mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo

from workflow_scripts.launch import attempts, step, verdicts
from workflow_scripts.step import REPEATS

TrainingOf = Callable[[Any], "step.Job | None"]
Stamp = tuple[int, ...]
LINE = 4096  # bytes, more than a log's last line has


def spare_vain_attempts(workflow: Any, training_of: TrainingOf) -> None:
    """To be called before the first job. ``training_of``: the training behind a job of Snakemake, None for
    others.
    """
    for name in ("_executor", "_local_executor"):
        executor = getattr(workflow.scheduler, name, None)
        if executor is not None:
            _Guard(executor, training_of)


class _Guard:
    """Stands between the scheduler and one executor."""

    def __init__(self, executor: Any, training_of: TrainingOf) -> None:
        self.executor, self.training_of = executor, training_of
        self.said_before: dict[Any, tuple[dict[str, Any], ...]] = {}
        self.logs_before: dict[Any, dict[Path, Stamp]] = {}
        self.in_vain: set[Any] = set()
        self._run_jobs, self._handle_job_error = executor.run_jobs, executor.handle_job_error
        executor.run_jobs, executor.handle_job_error = self.run_jobs, self.handle_job_error

    def run_jobs(self, jobs: Iterable[Any]) -> None:
        """Starts the jobs, but for trainings that would be refused at once: these fail here, with the
        reason.
        """
        started = []
        for job in jobs:
            training = self.training_of(job)
            reason = step.why_in_vain(training) if training is not None else None
            if reason is not None:
                self.in_vain.add(job)
                self.executor.report_job_error(SubmittedJobInfo(job), msg=f"{reason}\n")
                continue
            if training is not None:
                self.said_before[job] = _said(training)
            else:
                self.logs_before[job] = {path: _stamp(path) for path in map(Path, job.log)}
            started.append(job)
        if started:
            self._run_jobs(started)

    def handle_job_error(self, job: Any) -> None:
        """Uses up the attempts of a training that ended with a verdict, was ended by its user, or refused by
        the checks before its start, and those of any other step that was refused its inputs.
        """
        training = self.training_of(job)
        final = self._is_refused(job) if training is None else self._is_final(job, training)
        if final:
            job.attempt = job.restart_times + 1
        self._handle_job_error(job)

    def _is_final(self, job: Any, training: step.Job) -> bool:
        if job in self.in_vain or verdicts.read_end(training.manifest.parent):
            return True
        before = self.said_before.get(job, ({}, {}))
        return any(now and now != then for now, then in zip(_said(training), before, strict=True))

    def _is_refused(self, job: Any) -> bool:
        return any(_ends_for_good(path, old) for path, old in self.logs_before.get(job, {}).items())


def _stamp(path: Path) -> Stamp:
    facts = path.stat() if path.is_file() else None
    return (facts.st_ino, facts.st_size, facts.st_mtime_ns) if facts else ()


def _ends_for_good(log: Path, before: Stamp) -> bool:
    """Whether a log that was written since says in its last line that the next attempt would fail too."""
    if _stamp(log) in ((), before):
        return False
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - LINE))
        return REPEATS in stream.read().decode(errors="replace").rstrip().rpartition("\n")[2]


def _said(training: step.Job) -> tuple[dict[str, Any], ...]:
    """The last refusal and the last verdict of a training; each says when."""
    return attempts.read_refusal(training.state), verdicts.read_verdict(training.state)
