"""Ends one training for good: it saves and is not started again, whatever Snakemake does.

    python -m workflow_scripts.end finetune/vanilla-d8c918133c     # as `status` shows it, or its beginning
    python -m workflow_scripts.end --again finetune/vanilla        # takes that back

Everything else of the workflow goes on. `scancel` alone does not end a training: Snakemake submits it again.
"""

from __future__ import annotations

import getpass
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts.command_line import command_line
from workflow_scripts.config.problems import known, suggestion
from workflow_scripts.io import UserError, read_json, user_errors
from workflow_scripts.launch.ownership import OWNER, alive
from workflow_scripts.launch.verdicts import ENDED, end_for_good
from workflow_scripts.stages import STAGES
from workflow_scripts.status.queue import QueuedJob, jobs_of, training_of


def find_run(root: Path, name: str) -> tuple[str, str]:
    """Stage and run of `stage/run`, where the run's beginning is enough. Raises UserError where it isn't."""
    stage, _, begin = name.removeprefix("runs/").rstrip("/").partition("/")
    if stage not in STAGES or not begin:
        raise UserError(f"{name!r}: allowed: STAGE/RUN as `status` shows them; stages: {known(STAGES)}")
    names = {path.name for path in root.glob(f"runs/{stage}/*") if path.is_dir()}
    names |= {run for job in jobs_of(root) for found, run in [training_of(job) or ("", "")] if found == stage}
    found = [begin] if begin in names else sorted(run for run in names if run.startswith(begin))
    if len(found) != 1:
        what = f"several runs begin so: {', '.join(found)}" if found else f"there are: {known(names)}"
        fix = "write more of the name" if found else suggestion(begin, names, "see `status`")
        raise UserError(f"{name!r}: {what}; {fix}")
    return stage, found[0]


def end(root: Path, stage: str, run: str) -> str:
    """Marks the training as ended and asks what computes it to save and end; says what was done."""
    end_for_good(root / "runs" / stage / run, getpass.getuser())
    done = [_cancel(job) for job in jobs_of(root) if training_of(job) == (stage, run)]
    if not done:
        done = [_stop(path) for path in root.glob(f"runs/{stage}/{run}/*/{OWNER}")]
    return "; ".join(text for text in done if text) or "nothing computes it now"


def _cancel(job: QueuedJob) -> str:
    waits = job.state == "PENDING"
    subprocess.run(["scancel", *([] if waits else ["--signal=TERM"]), job.job], check=False, timeout=60)
    return f"Slurm job {job.job} is cancelled" if waits else f"Slurm job {job.job} is asked to save and end"


def _stop(path: Path) -> str:
    """Tells the launcher of this machine, which tells its training."""
    owner = read_json(path)
    if owner.get("job") or alive(owner) is False:
        return ""
    if owner["host"] != socket.gethostname():
        return (
            f"process {owner['pid']} on {owner['host']} computes it: end it there (kill -TERM {owner['pid']})"
        )
    os.kill(owner["pid"], signal.SIGTERM)
    return f"process {owner['pid']} is asked to save and end"


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Ends a training, or takes an end back."""
    parser = command_line("end", __doc__)
    parser.add_argument("training", nargs="+", metavar="STAGE/RUN", help="as `status` shows them")
    parser.add_argument("--directory", type=Path, default=Path(), help="the working folder")
    parser.add_argument("--again", action="store_true", help="take the end back")
    options = parser.parse_args(argv)
    for stage, run in [find_run(options.directory, name) for name in options.training]:
        if options.again:
            (options.directory / "runs" / stage / run / f"{ENDED}.json").unlink(missing_ok=True)
            print(f"{stage} {run}: not ended any more; the next start of the workflow continues it")
        else:
            print(f"{stage} {run}: ended for good; {end(options.directory, stage, run)}")


if __name__ == "__main__":
    main()
