"""What a user sees of running, finished, interrupted, failed and killed trainings."""

import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress

import pytest
from rich.console import Console

from tests.support.workspace import ROOT
from workflow_scripts.io import UserError, write_json
from workflow_scripts.launch import attempts
from workflow_scripts.launch.ownership import Ownership
from workflow_scripts.launch.step import complete
from workflow_scripts.launch.verdicts import end_for_good, pronounce
from workflow_scripts.plan.plan import read_plan
from workflow_scripts.status.cli import Tail, as_json, main
from workflow_scripts.status.failures import say_failures
from workflow_scripts.status.read import all_statuses, read_status
from workflow_scripts.status.table import Trainings, duration, shorten, table

LOG = (
    "llava_ext: step 3/8\nTraceback (most recent call last):\nerror: an older one\nerror: {}\nand its second"
    " line\n"
)


class Folder:
    """A working folder with trainings of the demo's configuration, in any state."""

    def __init__(self, root):
        self.root = root
        self.plan = read_plan([ROOT / "config/config.yaml"])

    def training(self, experiment, stage="finetune", steps=3, **compute):
        """The state folder of a training that has made so many steps."""
        spec = complete(self.plan.training_spec(stage, self.plan.run(stage, experiment).name))
        spec["compute"] |= compute
        spec["recipe"]["max_steps"] = 8
        state = self.root / "runs" / stage / spec["run"] / "0123456789"
        write_json(state / "spec.json", {"spec": spec})
        rows = [
            {"step": step, "loss": 2.5, "tokens_per_s": 1000.0, "time": time.time() - 60 + step}
            for step in range(1, steps + 1)
        ]
        (state / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return state

    def ended(self, experiment, outcome, log="", **options):
        """A training whose one attempt has ended, with that log."""
        state = self.training(experiment, **options)
        row = attempts.begin(state, [])
        (state / row["log"]).write_text(log)
        if outcome:
            attempts.end(state, row, outcome)
        return state

    def finished(self, experiment, stage="finetune"):
        state = self.ended(experiment, "finished", steps=8, stage=stage)
        write_json(state / "train_result.json", {"status": "finished", "step": 8})
        return state

    def running(self, experiment, **options):
        """A training that this process computes."""
        state = self.training(experiment, **options)
        attempts.begin(state, [])
        Ownership(state).claim()
        return state

    def one(self, experiment, stage="finetune"):
        run = self.plan.run(stage, experiment).name
        return next(item for item in all_statuses(self.root) if (item.stage, item.run) == (stage, run))


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_every_state_is_told(folder):
    folder.finished("vanilla", "pretrain")
    folder.running("normalize", nodes=2, gpus_per_node=8)
    folder.ended("vanilla", "interrupted")
    folder.ended("compress_4", "failed (1)", LOG.format("record 7: no such image"))
    folder.ended("compress_1", None, "llava_ext: step 3/8\n")
    lines = table(all_statuses(folder.root)).splitlines()
    for word in ("finished", "running", "interrupted", "failed", "killed"):
        assert sum(f" {word} " in line for line in lines[:-1]) == 1
    assert lines[-1] == "1 running, 1 interrupted, 1 killed, 1 failed, 1 finished"
    failed = next(place for place, line in enumerate(lines) if " failed " in line)
    assert lines[failed + 1] == "    record 7: no such image"
    assert lines[failed + 2].endswith("0123456789/logs/attempt-001.log")
    killed = next(place for place, line in enumerate(lines) if " killed " in line)
    assert "without a word" in lines[killed + 1]


def test_how_much_of_the_card_is_used(folder):
    """A card of the register with its share, another without; columns that no training fills are left out."""
    assert "TFLOP/s" not in table([read_status(folder.training("vanilla"))])
    measured = {"tflop_per_s": 412.4, "data_wait_share": 0.031}
    shown = []
    for experiment, more in (("normalize", {"peak_share": 0.417}), ("compress_4", {})):
        state = folder.training(experiment)
        row = {"step": 4, "loss": 2.0, "tokens_per_s": 9000.0, "time": time.time(), **measured, **more}
        with (state / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        shown.append(table([read_status(state)]).splitlines())
    assert [word in shown[0][0] for word in ("tok/s", "TFLOP/s", "wait")] == [True] * 3
    assert "9000 412 (42%) 3% 0 cpu" in " ".join(shown[0][1].split())
    assert "9000 412 3% 0 cpu" in " ".join(shown[1][1].split())


def test_a_verdict_says_its_reason_and_what_to_change(folder, capfd):
    state = folder.ended("vanilla", "verdict", LOG.format("in the flags' words"))
    spec = json.loads((state / "spec.json").read_text())["spec"]
    pronounce(state, spec, "the loss is nan\nLook at --learning_rate", "logs/attempt-001.log")
    item = folder.one("vanilla")
    assert item.state == "verdict"
    assert item.reason == "the loss is nan Look at stages.finetune.learning_rate"
    assert "1 verdict" in table(all_statuses(folder.root))
    say_failures(folder.root, {(item.stage, item.run)})
    assert f"finetune {item.run}: verdict: the loss is nan Look at stages." in capfd.readouterr().err
    say_failures(folder.root, {(item.stage, "a run of another configuration")})
    assert capfd.readouterr().err == ""


def test_a_running_training_says_why_its_last_attempt_failed(folder):
    state = folder.ended("vanilla", "failed (1)", LOG.format("disk full"))
    Ownership(state).claim()
    attempts.begin(state, attempts.read_attempts(state))
    item = folder.one("vanilla")
    assert (item.state, item.reason) == ("running", "attempt 1: disk full")
    assert item.log.endswith("attempt-001.log")


def test_what_a_check_refused_is_shown_until_the_next_attempt(folder):
    state = folder.ended("vanilla", "interrupted")
    with pytest.raises(UserError), attempts.recorded_refusal(state):
        raise UserError("what is lacking:\n  n1: 0 GPUs are visible")
    item = folder.one("vanilla")
    assert (item.state, item.reason, item.log) == ("refused", "what is lacking: n1: 0 GPUs are visible", "")
    log = folder.root / "logs/finetune" / f"{item.run}.log"
    log.parent.mkdir(parents=True)
    log.touch()
    assert folder.one("vanilla").log == str(log)
    attempts.begin(state, attempts.read_attempts(state))
    assert folder.one("vanilla").state == "killed"  # nobody computes it


@pytest.mark.parametrize(
    ("compute", "shown"),
    [
        ({}, "cpu"),
        ({"processes_per_node": 2, "parallel": "ddp"}, "cpu x2"),
        ({"gpus_per_node": 8}, "8"),
        ({"nodes": 2, "gpus_per_node": 8}, "2x8"),
    ],
)
def test_gpus(folder, compute, shown):
    assert read_status(folder.training("vanilla", **compute)).gpus == shown


def test_a_hang_shows_as_time_since_the_last_step(folder):
    state = folder.running("vanilla")
    (state / "attempts.jsonl").unlink()
    (state / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "time": time.time() - 4000}))
    assert read_status(state).idle_s >= 4000
    assert folder.ended("compress_4", "interrupted") and folder.one("compress_4").idle_s is None
    assert [duration(value) for value in (None, 9, 309, 11109)] == ["", "9s", "5:09", "3:05:09"]


def test_what_was_raised_is_the_reason_where_there_is_no_message(folder):
    log = (
        "torch.OutOfMemoryError: CUDA out of"
        " memory\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    )
    assert read_status(folder.ended("vanilla", "failed (1)", log)).reason == log.splitlines()[0]
    assert "failed (-9)" in read_status(folder.ended("normalize", "failed (-9)")).reason


def test_experiments_that_use_a_run(folder):
    folder.finished("vanilla", "pretrain")
    for name in ("first", "second"):
        runs = {"pretrain": folder.plan.run("pretrain", "vanilla").name}
        write_json(folder.root / "experiments" / name / "checkpoint.json", {"runs": runs})
    (folder.root / "experiments/first/checkpoint.json").with_name("other").mkdir()
    assert folder.one("vanilla", "pretrain").experiments == ["first", "second"]
    assert "first, second" in table(all_statuses(folder.root))


@pytest.mark.parametrize("width", [80, 140, 200])
def test_a_line_fits_the_terminal_and_keeps_the_runs_key(folder, width):
    folder.running("normalize_multilayer")
    folder.ended("compress_4", "failed (1)", LOG.format("x" * 300))
    lines = table(all_statuses(folder.root), width).splitlines()
    assert max(len(line) for line in lines if not line.startswith("    log: ")) <= width
    key = folder.plan.run("finetune", "normalize_multilayer").name[-10:]
    assert sum(key in line for line in lines) == 1
    assert "x" * 300 in table(all_statuses(folder.root))


def test_names_are_shortened_in_the_middle():
    assert shorten("normalize-multilayer-compress-4-0123456789", 24) == "normalize-mu…-0123456789"
    assert shorten("vanilla-0123456789", 24) == "vanilla-0123456789"


def test_half_written_and_damaged_files_do_no_harm(folder):
    state = folder.running("vanilla")
    with (state / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')
    (state / "train_result.json").write_text('{"status"')
    assert folder.one("vanilla").step == 3 and folder.one("vanilla").state == "running"
    (state / "owner.json").write_text("{")
    assert folder.one("vanilla").state == "killed"
    (state / "spec.json").write_text("{}")
    assert folder.one("vanilla").state == "unreadable"
    assert "1 unreadable" in table(all_statuses(folder.root))


def test_folders_that_come_and_go_while_it_looks(folder):
    """Trainings are made and deleted all the time; every look shows whole lines only."""
    code = (
        "import shutil, sys\n"
        "while True:\n"
        "    shutil.copytree(sys.argv[1], sys.argv[2] + '/new')\n"
        "    shutil.rmtree(sys.argv[2] + '/new')\n"
    )
    state = folder.finished("vanilla")
    source = shutil.copytree(state, folder.root / "source")
    with subprocess.Popen([sys.executable, "-c", code, str(source), str(state.parent)]) as other:
        for _ in range(200):
            assert {item.run for item in all_statuses(folder.root)} == {state.parent.name}
        assert other.poll() is None
        other.kill()


def test_an_owner_that_cannot_be_asked_is_judged_by_its_last_sign_of_life(folder):
    state = folder.running("vanilla")
    owner = json.loads((state / "owner.json").read_text()) | {"host": "elsewhere"}
    write_json(state / "owner.json", owner)
    assert folder.one("vanilla").state == "running"
    row = json.loads((state / "attempts.jsonl").read_text()) | {"started": time.time() - 7200}
    (state / "attempts.jsonl").write_text(json.dumps(row) + "\n")
    (state / "metrics.jsonl").unlink()
    assert folder.one("vanilla").state == "unknown"


def test_json_keeps_its_names(folder):
    folder.finished("vanilla")
    found = json.loads(as_json(folder.root))
    assert {
        "stage",
        "run",
        "state",
        "step",
        "steps",
        "loss",
        "tokens_per_s",
        "eta_s",
        "attempts",
        "processes",
        "saved_step",
        "where",
        "folder",
    } <= set(found)
    assert found["state"] == "finished" and found["saved_step"] == 8


def test_no_training_yet(tmp_path, capfd):
    (tmp_path / "runs").mkdir()
    main(["--directory", str(tmp_path)])
    assert capfd.readouterr().out == "no training yet\n"


CONTROL = re.compile(rb"\033\[[?0-9;]*[A-Za-z]|\r")


def test_watching_shows_what_changes_and_ends_with_ctrl_c(folder):
    folder.finished("vanilla")
    terminal, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-m", "workflow_scripts.status", "--watch", "0.1", "--directory", folder.root]
    environment = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=other, stdout=other, stderr=other)
    os.close(other)
    shown = b""

    def wait_for(words):
        nonlocal shown
        while words not in CONTROL.sub(b"", shown):
            shown += os.read(terminal, 1 << 16)

    wait_for(b"1 finished")
    folder.ended("compress_4", "failed (1)", LOG.format("record 7: no such image"))
    wait_for(b"1 failed, 1 finished")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    with suppress(OSError):  # what Linux says of a terminal that nobody has open any more
        while piece := os.read(terminal, 1 << 16):
            shown += piece
    os.close(terminal)
    words = CONTROL.sub(b"", shown).decode()
    left = words[words.rindex("stage ") :].splitlines()
    assert "    record 7: no such image" in left and "1 failed, 1 finished" in left, "the last table stays"
    assert max(map(len, left)) <= 100
    assert "Traceback" not in words
    hidden_or_back = re.findall(rb"\033\[\?25([hl])", shown)
    assert hidden_or_back[-1] == b"h", "the cursor is back"


def test_a_low_terminal_keeps_the_titles_the_last_trainings_and_the_sum(folder):
    for name in ("vanilla", "normalize", "compress_4", "compress_1"):
        folder.ended(name, "failed (1)", LOG.format(f"why {name} failed"))
    console = Console(width=100, height=8, file=io.StringIO())
    console.print(Tail(Trainings(all_statuses(folder.root))))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 7 and lines[0].startswith("stage") and lines[-1] == "4 failed"
    assert lines[1] == f"... {len(table(all_statuses(folder.root), 100).splitlines()) - 6} lines more"


def test_a_pipe_gets_plain_lines_of_any_width(folder):
    folder.ended("vanilla", "failed (1)", LOG.format("[red]" + "x" * 300))
    command = [sys.executable, "-m", "workflow_scripts.status", "--directory", folder.root]
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": "40"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == table(all_statuses(folder.root)) + "\n"
    assert "[red]" + "x" * 300 in done.stdout and "\033" not in done.stdout


def test_what_its_user_has_ended_says_who_when_and_how_to_take_it_back(tmp_path, capsys):
    folder = Folder(tmp_path)
    state = folder.ended("vanilla", "interrupted", steps=5)
    unstarted = tmp_path / "runs/finetune/other-0123456789"
    for run in (state.parent, unstarted):
        end_for_good(run, "ada")
    items = {item.run: item for item in all_statuses(tmp_path)}
    assert {item.state for item in items.values()} == {"ended"} and len(items) == 2
    for run in (state.parent, unstarted):
        reason = items[run.name].reason
        assert reason.startswith("ended by ada at 20") and f"end --again finetune/{run.name}` takes" in reason
    say_failures(tmp_path, [("finetune", state.parent.name)])
    assert f"finetune {state.parent.name}: ended: ended by ada" in capsys.readouterr().err
    (state.parent / "ended.json").unlink()
    assert read_status(state).state == "interrupted"
