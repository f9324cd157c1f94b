"""Says what this machine has and lacks for the workflow: `python -m workflow_scripts.selftest [--configfile
FILE] [--slurm]`.

Run it on the login node; `--slurm` has Slurm say whether it would take each kind of job of the configuration,
and repeats the self-test on compute nodes, in one small job for each kind that the trainings ask for. The
exit status is 1 when something needed is missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from workflow_scripts.command_line import command_line
from workflow_scripts.io import UserError, user_errors
from workflow_scripts.launch.provenance import ROOT
from workflow_scripts.plan.plan import Plan, read_plan
from workflow_scripts.selftest.findings import Finding
from workflow_scripts.selftest.jobs import check_jobs
from workflow_scripts.selftest.machine import (
    check_cluster,
    check_folder,
    check_hardware,
    check_offline,
    check_python,
)
from workflow_scripts.selftest.needs import check_needs
from workflow_scripts.selftest.nodes import check_nodes


def findings(options: argparse.Namespace) -> Iterator[Finding]:
    """Everything that was asked for, as it is found."""
    folder = options.directory.resolve()
    yield from check_python()
    yield from check_hardware(options.gpus)
    yield from check_cluster()
    yield from check_offline()
    yield from check_folder(folder)
    if not options.configfile:
        return
    plan = _read(options.configfile)
    if isinstance(plan, Finding):
        yield plan
        return
    names = ", ".join(str(path) for path in options.configfile)
    yield Finding("configuration", True, f"{names}: {len(plan.checkpoints)} experiments")
    yield from check_needs(plan, folder)
    if options.slurm:
        tried = list(check_jobs(plan, options.configfile, ROOT / "slurm/config.yaml"))
        yield from tried
        if all(item.good for item in tried):  # else they would wait for what never comes
            yield from check_nodes(plan, options.configfile, folder)


def _read(files: Sequence[Path]) -> Plan | Finding:
    try:
        return read_plan(files)
    except UserError as error:
        return Finding("configuration", False, str(error))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints all findings; exit status 1 when something needed is missing."""
    parser = command_line("selftest", __doc__)
    parser.add_argument("--configfile", type=Path, nargs="+", help="also check what this configuration needs")
    parser.add_argument("--directory", type=Path, default=Path(), help="the working folder")
    parser.add_argument("--gpus", type=int, default=0, help="how many GPUs this machine must have")
    parser.add_argument("--slurm", action="store_true", help="also on compute nodes; needs --configfile")
    options = parser.parse_args(argv)
    failures = 0
    with user_errors():
        if options.slurm and not options.configfile:
            raise UserError("--slurm needs --configfile: its trainings say which kinds of job to try")
        for item in findings(options):
            failures += not item.good and item.needed
            print(item.line, flush=True)
    missing = "1 thing is" if failures == 1 else f"{failures} things are"
    print(f"{missing} missing" if failures else "everything that is needed is here")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
