"""Who holds a working folder: locks of the dead go, those of the living and their trainings stay."""

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest

from tests.support.workspace import ROOT
from workflow_scripts.io import UserError, write_json
from workflow_scripts.launch import snakemakes
from workflow_scripts.launch.ownership import Ownership
from workflow_scripts.launch.snakemakes import LOCKS, RECORDS, Record, is_alive, read_record

ENTER = """
import sys
from workflow_scripts.io import user_errors
from workflow_scripts.launch import snakemakes
with user_errors():
    snakemakes.enter(unlock="--unlock" in sys.argv)
"""
STAY = ENTER + "print(snakemakes.mine(), flush=True); sys.stdin.read()"
SAY = ENTER + "from snakemake import exceptions; print(exceptions.LockException())"


def python(text, *arguments, **options):
    return {"args": [sys.executable, "-c", text, *arguments], "text": True, "cwd": options.pop("cwd")}


def enter(folder, text=ENTER, *arguments):
    """What a Snakemake says that starts in ``folder``."""
    options = python(text, *arguments, cwd=folder)
    done = subprocess.run(**options, env={"PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    return done.stdout + done.stderr


@contextmanager
def living(folder):
    """Another process that works in ``folder`` as a main Snakemake, and the name of its record."""
    options = python(STAY, cwd=folder)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(**options, **pipes, env={"PYTHONPATH": str(ROOT)}) as process:
        name = process.stdout.readline().strip()
        yield process, name
        process.kill()


def lock(folder):
    (folder / LOCKS).mkdir(parents=True)
    (folder / LOCKS / "0.output.lock").write_text("report/index.html\n")


def test_a_lock_of_the_living_is_explained_and_one_of_the_dead_goes(tmp_path):
    lock(tmp_path)
    with living(tmp_path) as (process, _):
        said = enter(tmp_path, SAY)
        assert f"Snakemake (process {process.pid} on " in said and f"works in {tmp_path}" in said
        assert f"kill -INT {process.pid} on " in said and "--unlock" not in said
        refused = enter(tmp_path, ENTER, "--unlock")
        assert refused.startswith("error: --unlock: ") and f"process {process.pid}" in refused
        assert (tmp_path / LOCKS / "0.output.lock").exists()
        process.kill()
        process.wait()
        assert f"process {process.pid} on " in (said := enter(tmp_path)) and "has died; its lock" in said
    assert not (tmp_path / LOCKS).exists()
    assert not list((tmp_path / RECORDS).iterdir()), "ends in order leave nothing, the dead are forgotten"


def test_a_lock_of_nobody_known_stays(tmp_path):
    lock(tmp_path)
    assert enter(tmp_path) == ""
    assert (tmp_path / LOCKS / "0.output.lock").exists()


def test_a_holder_on_another_machine_is_named_and_unlock_forgets_it(tmp_path):
    lock(tmp_path)
    (tmp_path / RECORDS).mkdir()
    elsewhere = {"boot": "b", "machine": "m", "host": "login2", "pid": 7, "user": "ada"}
    write_json(tmp_path / RECORDS / "login2.json", snakemakes.describe_myself() | elsewhere)
    said = enter(tmp_path, SAY)
    assert "ada's Snakemake (process 7 on login2" in said and "cannot see whether it lives" in said
    assert (tmp_path / LOCKS / "0.output.lock").exists()
    assert enter(tmp_path, ENTER, "--unlock") == ""  # the lock itself is Snakemake's to remove
    assert not list((tmp_path / RECORDS).iterdir())


def test_who_is_known_to_be_dead(monkeypatch):
    me = snakemakes.describe_myself()
    assert is_alive(me)
    assert is_alive(me | {"start": "1"}) is False, "the number of a process was given to another one"
    monkeypatch.setattr(snakemakes, "_line", lambda path: me["boot"] if "boot" in path else "same")
    assert is_alive(me | {"boot": "the last one", "machine": "same"}) is False, (
        "the machine has started again"
    )
    assert is_alive(me | {"boot": "its own", "machine": "another"}) is None
    assert is_alive(me | {"boot": "its own", "machine": ""}) is None


def test_signs_of_life_reach_other_machines(tmp_path, monkeypatch):
    monkeypatch.setattr(snakemakes, "is_alive", lambda content: None)
    record = Record(tmp_path / "r.json", snakemakes.describe_myself())
    write_json(record.path, record.content)
    assert not snakemakes.lives(record, 0.4)
    beat = subprocess.Popen(["sh", "-c", f"while sleep 0.05; do touch -c {record.path}; done"])
    assert snakemakes.lives(record, 60.0)
    beat.kill()
    beat.wait()


def test_a_training_of_a_living_snakemake_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(snakemakes.VARIABLE, raising=False)
    state = tmp_path / "state"
    state.mkdir()
    trains = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(0))"
    trains += "; print(flush=True); time.sleep(900)"
    start = python(trains, cwd=tmp_path) | {"stdout": subprocess.PIPE}
    with living(tmp_path) as (process, name), subprocess.Popen(**start) as trainer:
        trainer.stdout.read(1)
        owner = Ownership(state)
        start = snakemakes.process_start(trainer.pid)
        write_json(owner.path, owner.mine | {"pid": trainer.pid, "start": start, "snakemake": name})
        with pytest.raises(UserError, match=rf"process {process.pid} on .* is having this training done"):
            Ownership(state).claim()
        assert trainer.poll() is None and json.loads(owner.path.read_text())["pid"] == trainer.pid
        process.kill()  # now it is an orphan
        process.wait()
        Ownership(state).claim()
        assert trainer.wait(300) == 0, "it was not asked to save"
    assert read_record(name) is not None  # until the next Snakemake starts here
