"""Snakemake's own lines about jobs that failed, with what this workflow knows: why, and what happens next."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from workflow_scripts.launch.verdicts import read_end
from workflow_scripts.stages import STAGES
from workflow_scripts.status.read import Status, all_statuses, error_line


class JobErrors(logging.Filter):
    """Rewrites Snakemake's record of a failed job before it is shown.

    A training that has saved and is continued is no error; the last attempt says that there is no further
    one; every other failure carries the step's own `error:` line, and only logs that are there.
    """

    def __init__(self, root: Path, attempts: Callable[[str], int]) -> None:
        """``attempts``: how often a rule's job may be started in all."""
        super().__init__()
        self.root, self.attempts = root, attempts
        self.failed: Counter[tuple[str, ...]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Always true: nothing is left out."""
        if str(getattr(record, "event", "")).endswith("job_error"):
            self._rewrite(record)
        return True

    def _rewrite(self, record: logging.LogRecord) -> None:
        rule, outputs = str(record.__dict__["rule_name"]), [str(name) for name in record.__dict__["output"]]
        self.failed[rule, *outputs] += 1
        attempt, allowed = self.failed[rule, *outputs], self.attempts(rule)
        logs = [name for name in record.__dict__["log"] if (self.root / name).is_file()]
        record.__dict__["log"] = logs
        training = self._training(rule, outputs)
        if ended := self._end(rule, outputs):
            why = f"{rule} {Path(outputs[0]).parent.name}: {ended}"
        elif training and training.state == "interrupted":
            saved = f"{rule} {training.run}: saved at step {training.saved_step}"
            if attempt < allowed:
                record.levelno, record.levelname = logging.INFO, "INFO"
                record.__dict__["event"] = None
                record.msg = (
                    f"{saved} before its job ended; attempt {attempt + 1} of {allowed} continues there"
                )
                return
            why = f"{saved}; {used_up(attempt)}"
        else:
            why = error_line([self.root / name for name in logs])
        said = str(record.__dict__.get("rule_msg") or "")
        texts = [text for text in (why if why not in said else "", said) if text]
        record.__dict__["rule_msg"] = " | ".join(texts) or "no message"

    def _end(self, rule: str, outputs: Sequence[str]) -> str:
        """What was said when the user ended the training; empty where nobody did."""
        run = (self.root / outputs[0]).parent if rule in STAGES and outputs else None
        return str(read_end(run).get("reason", "")) if run else ""

    def _training(self, rule: str, outputs: Sequence[str]) -> Status | None:
        run = Path(outputs[0]).parent.name if rule in STAGES and outputs else None
        found = [item for item in all_statuses(self.root) if (item.stage, item.run) == (rule, run)]
        return found[-1] if found else None


def used_up(attempts: int) -> str:
    """What to do when the last attempt has saved too."""
    return f"its attempts ({attempts}, `attempts` in compute) are used up; the same command continues there"


def explain_failures(workflow: Any, root: Path) -> None:
    """From now on failed jobs are explained. To be called by the main Snakemake when it starts its jobs."""
    from snakemake.logging import logger

    logger.addFilter(JobErrors(root, lambda rule: int(workflow.get_rule(rule).restart_times) + 1))
