"""What a site wants to happen before every step: `config: {setup: ...}` of its profile, through the real
Snakefile.
"""

import os
import signal
import subprocess
import sys

import pytest
import yaml

from tests.support.workspace import ROOT, Workspace
from workflow_scripts.config.load import load_config
from workflow_scripts.io import UserError
from workflow_scripts.step import command

MADE = "data/sources/captions/manifest.json"


@pytest.fixture()
def workspace(tmp_path):
    """A folder whose Python is only found after the setup, as that of a module is."""
    workspace = Workspace(tmp_path / "w", options=["--profile", "site"]).draw()
    python = workspace.folder / "my modules/site-python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    workspace.config["python"] = "site-python"
    return workspace


def profile(workspace, setup):
    """What a site writes into `slurm/config.yaml`, here for this machine."""
    folder = workspace.folder / "site"
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"cores": 2, "config": {"setup": setup}}))


@pytest.mark.slow
def test_every_step_starts_after_the_setup_which_may_be_anything(workspace):
    script = 'place="my modules"; export PATH="$PWD/$place:$PATH" NOTHING="$UNSET"'
    (workspace.folder / "setup.sh").write_text(script)
    profile(workspace, "source setup.sh; ulimit -n 512")
    workspace.run(MADE)
    assert (workspace.folder / MADE).is_file()


@pytest.mark.slow
def test_a_setup_that_fails_ends_the_step_and_is_shown(workspace):
    profile(workspace, "echo one; module-of-nowhere load cuda/12.4; echo two")
    done = workspace.run(MADE, check=False)
    assert done.returncode != 0
    assert "setup failed with status 127, so the step was not started" in done.stdout
    assert "is: echo one; module-of-nowhere load cuda/12.4; echo two\n" in done.stdout
    assert not (workspace.folder / MADE).exists()
    assert not any(log.read_text() for log in workspace.folder.glob("logs/acquire/*")), "the step was started"


@pytest.mark.parametrize("setup", ["", "export A=1; true"])
def test_the_step_replaces_the_shell_so_that_signals_reach_it(tmp_path, setup):
    told = (
        "import os, signal; signal.signal(15, lambda *a: os._exit(75)); print(os.getpid(), flush=True);"
        " signal.pause()"
    )
    (tmp_path / "python").write_text(f"#!/bin/sh\nexec {sys.executable} -c '{told}'\n")
    (tmp_path / "python").chmod(0o755)
    line = f"set -euo pipefail; {command(str(tmp_path / 'python'), ROOT, setup)} --log log step"
    with subprocess.Popen(["bash", "-c", line], stdout=subprocess.PIPE, text=True) as shell:
        assert int(shell.stdout.readline()) == shell.pid
        os.kill(shell.pid, signal.SIGTERM)
    assert shell.returncode == 75


@pytest.mark.parametrize("setup", ["exit 0", "exit 3", "if", "false; true"])
def test_no_setup_gets_past_its_own_failure(tmp_path, setup):
    line = f"{command('echo', ROOT, setup)} --log log step"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not done.stdout
    assert f"setup (docs/slurm.md) is: {setup}" in done.stderr


def test_what_would_not_reach_a_job_as_it_is_is_refused(workspace):
    for text in ("export A='b'", 'echo "a"', "cd $HOME", "one\ntwo", "a\\ b", "`date`"):
        with pytest.raises(
            UserError, match=r"setup: .*write the commands into a file and set setup to: source FILE"
        ):
            load_config({**workspace.config, "setup": text})
