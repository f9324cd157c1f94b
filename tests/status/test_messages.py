"""Snakemake's lines about failed jobs, with the reason, what happens next, and only logs that are there."""

import logging

from snakemake.logging import DefaultFormatter
from snakemake_interface_logger_plugins.common import LogEvent

from tests.status.test_status import Folder
from workflow_scripts.launch import attempts
from workflow_scripts.status.messages import JobErrors
from workflow_scripts.status.read import read_status


def failed(rule, output, log):
    """Snakemake's record of a failed job."""
    record = logging.LogRecord("snakemake", logging.ERROR, "", 0, f"Error in rule {rule}", (), None)
    about = {"rule_name": rule, "rule_msg": None, "jobid": 3, "input": [], "output": [output], "log": log}
    about |= {"conda_env": None, "container_img": None, "aux": {}, "indent": False, "shellcmd": "x"}
    record.__dict__.update(about, event=LogEvent.JOB_ERROR)
    return record


def shown(errors, *about):
    record = failed(*about)
    assert errors.filter(record)
    return record.levelname, DefaultFormatter().format(record)


def test_a_planned_continuation_is_no_error_and_the_last_attempt_says_that_it_is_the_last(tmp_path):
    folder = Folder(tmp_path)
    state = folder.ended("vanilla", "interrupted", steps=5)
    saved = state / "checkpoint-5"
    saved.mkdir()
    (saved / "complete.json").write_text("{}")
    run = read_status(state).run
    errors, output = JobErrors(tmp_path, lambda rule: 2), f"runs/finetune/{run}/manifest.json"
    level, text = shown(errors, "finetune", output, [])
    assert level == "INFO"
    assert text == f"finetune {run}: saved at step 5 before its job ended; attempt 2 of 2 continues there"
    level, text = shown(errors, "finetune", output, [])
    assert level == "ERROR" and "Error in rule finetune" in text
    assert f"finetune {run}: saved at step 5; its attempts (2, `attempts` in compute) are used up" in text
    assert "the same command continues there" in text


def test_a_failure_carries_the_steps_own_words_and_logs_that_exist(tmp_path):
    state = Folder(tmp_path).ended("vanilla", "failed (1)")
    log = tmp_path / "logs/scan/coco.log"
    log.parent.mkdir(parents=True)
    log.write_text(
        "looks\nerror: an older one\nerror: coco.zip: cut off at byte 7; fetch it again\nthe step failed\n"
    )
    errors = JobErrors(tmp_path, lambda rule: 3)
    names = ["logs/scan/coco.log", "logs/slurm/rule_scan/coco/5.log"]
    _, text = shown(errors, "scan", "data/scans/coco/manifest.json", names)
    assert "message: coco.zip: cut off at byte 7; fetch it again\n" in text
    assert "log: logs/scan/coco.log (check" in text and "rule_scan" not in text
    log.write_text("Traceback (most recent call last):\nKeyError: 'images'\n")
    assert "message: KeyError: 'images'\n" in shown(errors, "scan", "data/scans/coco/manifest.json", names)[1]
    assert len(attempts.read_attempts(state)) == 1
    output = f"runs/finetune/{read_status(state).run}/manifest.json"
    _, text = shown(errors, "finetune", output, ["logs/finetune/absent.log"])
    assert "message: no message" in text and "absent.log" not in text
