"""A record that fails ends a training with its state saved; without the record it goes on from there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from llava_ext.data.samples import open_samples
from llava_ext.data.skipping import find_records, identified
from llava_ext.errors import TrainingError
from tests.support.trainings import GOLDEN, command_line, losses, result, run

# Twelve records, two a step, in their order; dropout makes the random numbers count.
ORDERED = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "sampling": "sequential",
    "group_by_modality_length": None,
    "max_steps": 9,
    "num_train_epochs": None,
    "save_steps": 1000,
    "lora_enable": True,
    "lora_r": 2,
    "lora_dropout": 0.5,
}
BAD = 7  # in step 4 of the first epoch


def records(count=12):
    found = json.loads((GOLDEN / "train/stage2.json").read_text())
    return [{**record, "id": f"r{number}"} for number, record in enumerate(found[:count], 1)]


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def broken(number=BAD):
    """The records, with a picture that does not exist in one of them."""
    found = records()
    found[number - 1] = {**found[number - 1], "image": "gone.png"}
    found[number - 1]["conversations"][0]["value"] = "<image>\nWhat is this?"
    return found


def history(folder):
    return json.loads((folder / "run_identity.json").read_text()).get("skipped")


def test_records_are_found_by_id_and_by_number(tmp_path):
    nameless = {"conversations": records(1)[0]["conversations"]}
    many = [*records(), {**records(1)[0], "id": 77}, {**records(2)[1], "id": "r1"}, nameless]
    store = open_samples(write(tmp_path / "many.json", many), GOLDEN / "images")
    assert find_records(store, " r3, #12,77 ,r3, #3,") == [2, 11, 12]
    assert find_records(store, "") == []
    assert find_records(store, "#15") == [14]
    assert identified(store, [12, 14]) == [
        {"record": 13, "id": 77, "source": "many"},
        {"record": 15, "id": None, "source": "many"},
    ]
    for wanted, words in {
        "r3,r99": "--skip_samples r99: no record of .*many.json has this id",
        "#16": "--skip_samples #16: .*many.json has the records #1 to #15",
        "#0": "#1 to #15",
        "r1": "2 records of .* have this id: #1,#14; give the numbers",
    }.items():
        with pytest.raises(TrainingError, match=words):
            find_records(store, wanted)


def test_a_record_that_fails_is_left_out_and_the_training_goes_on(tmp_path, train_here):
    """From the step before the one that it is in, with the bits of a training that never had it."""

    def flags(name, **changes):
        return command_line(2, tmp_path / name, data_path=data, dataloader_num_workers=1, **ORDERED | changes)

    data = write(tmp_path / "data.json", broken())
    status, text = train_here(flags("out"))
    assert status == 1 and "Traceback" not in text
    for part in (
        f"data.json, record {BAD} (id 'r{BAD}', source data, gone.png)",
        "gone.png: No such file or directory",
        "Stopped before step 4; the state after step 3 is saved",
        f'--skip_samples "#{BAD}"',
    ):
        assert part in text
    assert (result(tmp_path / "out")["status"], result(tmp_path / "out")["step"]) == ("verdict", 3)
    assert (tmp_path / "out/checkpoint-3/complete.json").is_file()

    status, text = train_here(flags("out", skip_samples=f"#{BAD}"))
    assert status == 0, text[-3000:]
    assert f"after step 3 1 records are left out: #{BAD}" in text and "continuing from" in text
    left_out = [{"record": BAD, "id": f"r{BAD}", "source": "data"}]
    assert history(tmp_path / "out") == result(tmp_path / "out")["skipped"]
    assert history(tmp_path / "out") == [{"after_step": 3, "records": left_out}]

    assert train_here(flags("straight", skip_samples=f"r{BAD}", save_steps=2))[0] == 0
    assert history(tmp_path / "straight") == [{"after_step": 0, "records": left_out}]
    assert losses(tmp_path / "out") == losses(tmp_path / "straight") and len(losses(tmp_path / "out")) == 9
    assert result(tmp_path / "out")["files"] == result(tmp_path / "straight")["files"]

    status, text = train_here(flags("out"))
    assert status == 1 and f'a finished training, which left out "#{BAD}"' in text
    assert train_here(flags("out", skip_samples=f"r{BAD}"))[0] == 0


def test_every_other_sample_keeps_its_place(tmp_path, train_here):
    """One step of four records equals, left out one, the step in which that one has no label."""
    silent = broken()
    silent[1]["conversations"] = [
        {"from": "human", "value": "What is this?"},
        {"from": "gpt", "value": ""},
    ]
    silent[1].pop("image", None)
    changes = {"max_steps": 3, "per_device_train_batch_size": 4, "lora_enable": None, "lora_r": None}
    changes |= {"lora_dropout": None, "learning_rate": 1e-3, "mismatch_bound": 1, "warmup_ratio": 0}
    for name, content, skip in (("skipped", records(), "#2,#7"), ("silent", silent, "#7")):
        data = write(tmp_path / f"{name}.json", content)
        argv = command_line(2, tmp_path / name, data_path=data, skip_samples=skip, **ORDERED | changes)
        status, text = train_here(argv)
        assert status == 0, text[-3000:]
    for ours, theirs in zip(losses(tmp_path / "skipped"), losses(tmp_path / "silent"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("pack", [False, True])
def test_a_micro_batch_of_nothing_but_what_is_left_out(stage, pack, tmp_path, train_here):
    """The model sees a token without a label; the loss of that micro-batch is zero."""
    data = tmp_path / "data.json"
    shutil.copy(GOLDEN / f"train/stage{stage}.json", data)
    changes = {"lora_enable": None, "lora_r": None, "lora_dropout": None, "max_steps": 2, "pack": pack}
    changes |= {"per_device_train_batch_size": 1, "data_path": data, "skip_samples": "#1", "warmup_ratio": 0}
    changes |= {"supervised_share_bound": 0, "save_strategy": "no"}
    status, text = train_here(command_line(stage, tmp_path / "out", **ORDERED | changes))
    assert status == 0, text[-3000:]
    assert [loss == 0 for _, loss, *_ in losses(tmp_path / "out")] == [True, False]
    assert result(tmp_path / "out")["metrics"]["batches_without_labels"] == 1


@pytest.mark.slow
def test_a_disk_that_fails_later_costs_no_step_and_is_no_verdict(tmp_path, monkeypatch, train_here):
    """In the first step of the second epoch: that epoch's random numbers must not be drawn twice."""
    pictured = sorted(records(), key=lambda record: "image" not in record)
    data = write(tmp_path / "data.json", pictured)
    first = pictured[0]["image"]
    read, seen = Path.read_bytes, []

    def fail_once(path):
        if path.name == Path(first).name:
            seen.append(path)
            if len(seen) == 2:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    def flags(name):
        return command_line(2, tmp_path / name, data_path=data, skip_samples="#5", **ORDERED)

    assert train_here(flags("straight"))[0] == 0
    monkeypatch.setattr(Path, "read_bytes", fail_once)
    status, text = train_here(flags("out"))
    assert status == 1 and os.strerror(errno.EIO) in text and "the state after step 6 is saved" in text
    assert not (tmp_path / "out/train_result.json").exists()
    assert train_here(flags("out"))[0] == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "straight")
    assert result(tmp_path / "out")["files"] == result(tmp_path / "straight")["files"]


@pytest.mark.slow
def test_all_ranks_save_and_stop_when_one_meets_a_bad_record(tmp_path):
    """ZeRO-2, two processes, dataset workers; the bad record is the second one's."""
    data = write(tmp_path / "data.json", broken(8))
    changes = {"data_path": data, "deepspeed": "zero2.json", "dataloader_num_workers": 1, "max_steps": 4}
    changes |= {"lora_enable": None, "lora_r": None, "lora_dropout": None}
    argv = command_line(2, tmp_path / "out", **ORDERED | changes)
    text = run(argv, tmp_path / "log", processes=2, expect=1)
    assert "the state after step 1 is saved" in text and '--skip_samples "#8"' in text
    assert result(tmp_path / "out")["status"] == "verdict"
    assert (tmp_path / "out/checkpoint-1/complete.json").is_file()
    text = run([*argv, "--skip_samples", "#8"], tmp_path / "log", processes=2)
    assert "continuing from" in text and len(losses(tmp_path / "out")) == 4
