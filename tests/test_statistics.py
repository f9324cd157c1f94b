"""What part of the data teaches something, per source, and where the tokenizer does not fit."""

from __future__ import annotations

import json

import pytest

from llava_ext import statistics
from tests.support.trainings import GOLDEN


def survey(capsys, *words):
    statistics.main([*map(str, words)])
    return capsys.readouterr()


def records(answers):
    return [
        {
            "id": f"r{number}",
            "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": answer}],
        }
        for number, answer in enumerate(answers)
    ]


def test_shares_and_mismatches(tmp_path, capsys):
    (tmp_path / "mine.json").write_text(json.dumps(records(["Because.", "", "So.", ""])))
    out = survey(capsys, "--data_path", tmp_path / "mine.json", "--tokenizer", GOLDEN / "llm", "--json").out
    found = json.loads(out)["mine"]
    assert (found["samples"], found["mismatches"], found["unsupervised"]) == (4, 2, 2)
    assert 0 < found["supervised_share"] < 0.2
    assert "id 'r1'" in found["examples"][0]


def test_another_tokenizer_shows(capsys):
    """One in which every multi-turn conversation is masked whole, silently in LLaVA."""
    data = ("--data_path", GOLDEN / "train" / "stage2.json", "--image_folder", GOLDEN / "images")
    fits = json.loads(survey(capsys, *data, "--tokenizer", GOLDEN / "tokenizer", "--json").out)["stage2"]
    other = json.loads(survey(capsys, *data, "--tokenizer", GOLDEN / "tokenizer_alt", "--json").out)["stage2"]
    assert fits["mismatches"] == 0 and other["mismatch_share"] > 0.3


def test_table(capsys):
    data = (
        "--data_path",
        GOLDEN / "train" / "stage1.json",
        "--image_folder",
        GOLDEN / "images",
        "--version",
        "plain",
    )
    printed = survey(capsys, *data, "--tokenizer", GOLDEN / "llm", "--samples", 10)
    head, row = printed.out.strip().splitlines()
    assert head.split()[:3] == ["source", "samples", "images"]
    assert row.split()[:3] == ["stage1", "10", "10"]


def test_mistakes_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        statistics.main(["--data_path", str(tmp_path / "nowhere.json"), "--tokenizer", str(GOLDEN / "llm")])
    assert "nowhere.json" in capsys.readouterr().err


def test_samples_are_spread():
    assert statistics.spread(10, 5) == [0, 2, 4, 6, 8]
    assert statistics.spread(3, 5) == statistics.spread(3, 0) == [0, 1, 2]
