"""What `clean_unused` takes for unused, and what stays all the same, in real folders."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from workflow_scripts.clean import Wishes, clean, find_unused, main
from workflow_scripts.configs_seen import all_seen, latest, remember
from workflow_scripts.io import UserError, write_json
from workflow_scripts.launch import ownership
from workflow_scripts.plan.plan import read_plan

OLD = 30 * 86400


def age(folder, seconds=OLD):
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (time.time() - seconds,) * 2)


class Folder:
    """A working folder with runs that look like those of the workflow."""

    def __init__(self, root):
        self.root = root

    def training(self, stage, name, finished=True, parent=None, state="state"):
        home = self.root / "runs" / stage / name
        write_json(home / state / "spec.json", {"inputs": {"parent": parent}})
        (home / state / "weights").write_bytes(bytes(1000))
        if finished:
            write_json(home / state / "train_result.json", {"status": "finished"})
            write_json(home / "manifest.json", {"digest": f"of-{name}", "folder": state})
        age(home)
        return home

    def made(self, kind, name, **content):
        home = self.root / "runs" / kind / name
        write_json(home / "manifest.json", {"digest": f"of-{name}", "folder": "x", **content})
        age(home)
        return home

    def seen(self, file, *runs, days=30.0):
        """A configuration has started here so many days ago."""
        remember(self.root, [self.root / file], {}, [f"runs/{run}" for run in runs])
        for path in (self.root / "runs/.configs").glob("*.json"):
            content = json.loads(path.read_text())
            if content["config"] == file and sorted(content["runs"]) == sorted(f"runs/{run}" for run in runs):
                write_json(path, content | {"time": time.time() - days * 86400})

    def going(self, *used, **wishes):
        found = find_unused(self.root, [f"runs/{run}" for run in used], Wishes(**wishes))
        return sorted(str(i.path.relative_to(self.root / "runs")) for i in found if not i.kept)

    def kept(self, *used, **wishes):
        found = find_unused(self.root, [f"runs/{run}" for run in used], Wishes(**wishes))
        return {str(i.path.relative_to(self.root / "runs")): i.kept for i in found if i.kept}


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_what_a_configuration_asked_for_and_asks_for_no_more_can_go(folder):
    for name in ("new", "old"):
        folder.training("finetune", name)
    folder.seen("a.yaml", "finetune/old", days=40)
    folder.seen("a.yaml", "finetune/new", days=39)
    assert folder.going() == ["finetune/old"]
    [item] = find_unused(folder.root, [])
    assert item.reason == "a.yaml does not ask for it any more"
    assert item.bytes > 1000 and abs(time.time() - OLD - item.last_used) < 60


def test_runs_of_every_configuration_that_used_the_folder_are_kept_though_their_files_are_gone(folder):
    for name in ("mine", "theirs"):
        folder.training("finetune", name)
    folder.seen("mine.yaml", "finetune/mine")
    folder.seen("theirs.yaml", "finetune/theirs", days=300)
    assert folder.going() == []
    assert folder.going(forget_config=["theirs.yaml"]) == ["finetune/theirs"]


def test_what_the_command_line_changes_is_a_configuration_of_its_own(folder):
    folder.training("finetune", "plain")
    folder.training("finetune", "changed")
    remember(folder.root, [folder.root / "a.yaml"], {}, ["runs/finetune/plain"])
    remember(folder.root, [folder.root / "a.yaml"], {"python": "python3"}, ["runs/finetune/changed"])
    assert list(latest(all_seen(folder.root))) == ["a.yaml", "a.yaml python=python3"]
    assert folder.going() == []


def test_runs_that_no_known_configuration_asked_for_are_kept(folder):
    folder.training("finetune", "who")
    assert "no known configuration" in folder.kept()["finetune/who"]
    assert folder.going(unknown=True) == ["finetune/who"]


def test_unfinished_trainings_are_kept(folder):
    folder.training("finetune", "half", finished=False)
    folder.seen("a.yaml", "finetune/half", days=40)
    folder.seen("a.yaml", days=39)
    assert "not finished" in folder.kept()["finetune/half"]
    assert folder.going(unfinished=True) == ["finetune/half"]


def test_what_was_used_lately_is_kept(folder):
    """By its files, or by a configuration that asked for it until then."""
    for name in ("trained", "asked"):
        folder.training("finetune", name)
    folder.seen("a.yaml", "finetune/trained", "finetune/asked", days=40)
    folder.seen("a.yaml", "finetune/asked", days=3)
    folder.seen("a.yaml", days=2)
    age(folder.root / "runs/finetune/trained", 3600)
    assert folder.going() == []
    assert folder.going(days=1) == ["finetune/asked"]
    assert folder.going(days=0) == ["finetune/asked", "finetune/trained"]


EVERYTHING = {"days": 0, "unknown": True, "unfinished": True}


def test_what_a_living_training_owns_is_kept_whatever_is_wished(folder):
    """And its stage 1, whatever configuration asked for it."""
    folder.training("pretrain", "theirs")
    child = folder.training("finetune", "theirs", finished=False, parent="of-theirs") / "state"
    owner = ownership.Ownership(child)
    owner.claim()
    assert folder.going(**EVERYTHING) == []
    assert folder.kept(**EVERYTHING)["pretrain/theirs"] == "runs/finetune/theirs was made from it"
    owner.release()
    assert folder.going(**EVERYTHING) == ["finetune/theirs", "pretrain/theirs"]
    assert folder.going("finetune/theirs", **EVERYTHING) == []


def test_what_may_be_computed_elsewhere_is_kept(folder, monkeypatch):
    """The job that owns it runs on another machine, and Slurm does not answer here."""
    monkeypatch.setenv("SLURM_CONF", "/dev/null")
    home = folder.training("finetune", "mine", finished=False)
    write_json(home / "state" / ownership.OWNER, {"host": "elsewhere", "job": "7", "pid": 1})
    assert folder.going(**EVERYTHING) == []


def test_what_a_kept_run_was_made_from_is_kept(folder):
    """A young export keeps its training and that one's parent; answers and scores stay with it."""
    folder.training("pretrain", "p")
    folder.training("finetune", "f", parent="of-p")
    folder.made("export", "e", finetune="f")
    folder.made("predict", "v", checkpoint={"run": "e"})
    assert folder.going(**EVERYTHING) == ["export/e", "finetune/f", "predict/v", "pretrain/p"]
    assert folder.going("export/e", **EVERYTHING) == []
    age(folder.root / "runs/export/e", 3600)
    assert folder.going(unknown=True) == ["predict/v"]


def questions(folder, name):
    """Questions that were written for a task of lmms-eval, and that no configuration asks any more."""
    home = folder.root / "data/questions" / name
    write_json(home / "manifest.json", {"name": name, "digest": f"of-{name}"})
    (home / "pictures.zip").write_bytes(bytes(5000))
    age(home)
    remember(folder.root, [folder.root / "a.yaml"], {}, [f"data/questions/{name}"])
    remember(folder.root, [folder.root / "a.yaml"], {}, [])
    for path in (folder.root / "runs/.configs").glob("*.json"):
        content = json.loads(path.read_text())
        write_json(path, content | {"time": time.time() - (40 if content["runs"] else 39) * 86400})
    return home


def test_written_questions_that_nobody_asks_can_go(folder):
    home = questions(folder, "pope-1")
    [item] = find_unused(folder.root, [])
    assert (item.path, item.kept) == (home, "")
    assert item.reason == "a.yaml does not ask for it any more" and item.bytes > 5000
    assert not list(find_unused(folder.root, ["data/questions/pope-1"])), "this configuration asks them"
    age(home, 3600)
    [item] = find_unused(folder.root, [])
    assert "used in the last 14 days" in item.kept
    clean(folder.root, [], Wishes(days=0), really=True, yes=True)
    assert not home.exists()


def test_half_written_questions_are_not_finished(folder):
    (questions(folder, "pope-1") / "manifest.json").unlink()
    [item] = find_unused(folder.root, [])
    assert "not finished" in item.kept
    assert not any(found.kept for found in find_unused(folder.root, [], Wishes(days=0, unfinished=True)))


def test_questions_of_answers_that_stay_are_kept(folder):
    """With a checkpoint its answers stay, and the report shows pictures beside them."""
    home = questions(folder, "pope-1")
    folder.training("finetune", "f")
    folder.made("export", "e", finetune="f")
    folder.made("predict", "p", checkpoint={"run": "e"}, source={"name": "pope-1", "digest": "d"})
    assert home not in {item.path for item in find_unused(folder.root, ["runs/export/e"])}
    age(folder.root / "runs/predict/p", 60)
    kept = {item.path: item.kept for item in find_unused(folder.root, [])}
    assert "no known configuration" in kept[folder.root / "runs/predict/p"]
    assert kept[home] == "runs/predict/p was made from it"


def test_a_configurations_written_questions_are_among_its_folders(folder):
    plan = read_plan([Path(__file__).parents[1] / "config/beyond-semantics.yaml"])
    asked = plan.questions["pope_random"].folder
    assert asked in plan.used_folders() and f"{asked}/manifest.json" == plan.questions_manifest("pope_random")


def test_runs_of_a_finished_experiment_are_kept_until_it_is_forgotten(folder):
    folder.training("finetune", "f")
    write_json(folder.root / "experiments/best/checkpoint.json", {"runs": {"finetune": "f"}})
    assert folder.going(**EVERYTHING) == []
    assert folder.going(forget=["best"], **EVERYTHING) == ["finetune/f"]


def test_states_of_former_inputs_can_go_by_the_same_rules(folder):
    home = folder.training("finetune", "f", state="0123456789")
    before, half = "a123456789", "b123456789"
    for state, status in ((before, "finished"), (half, "interrupted"), ("not a state", "finished")):
        write_json(home / state / "train_result.json", {"status": status})
    age(home)
    assert folder.going("finetune/f") == [f"finetune/f/{before}"]
    assert folder.going("finetune/f", unfinished=True) == [f"finetune/f/{before}", f"finetune/f/{half}"]
    age(home / before, 60)
    assert folder.going("finetune/f") == []


def test_bytes_that_another_folder_shares_are_not_counted_and_stay(folder):
    old = folder.training("finetune", "old")
    (old / "state/weights").write_bytes(bytes(10**6))
    shared = folder.made("export", "mine") / "weights"
    os.link(old / "state/weights", shared)
    folder.seen("a.yaml", "finetune/old", "export/mine", days=40)
    folder.seen("a.yaml", "export/mine", days=39)
    age(old)
    [item] = find_unused(folder.root, [])
    assert item.bytes < 10**5
    clean(folder.root, [], Wishes(), really=True, yes=True)
    assert not old.exists() and shared.read_bytes() == bytes(10**6)


def test_snakemakes_that_start_together_lose_no_record(folder):
    def start(number):
        for turn in range(5):
            remember(folder.root, [folder.root / f"{number}.yaml"], {}, [f"runs/finetune/{number}-{turn}"])

    threads = [threading.Thread(target=start, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = latest(all_seen(folder.root))
    assert {name: set(item.runs) for name, item in found.items()} == {
        f"{number}.yaml": {f"runs/finetune/{number}-4"} for number in range(8)
    }


def test_a_damaged_record_stops_the_removal(folder):
    folder.training("finetune", "f")
    folder.seen("a.yaml", "finetune/f")
    next((folder.root / "runs/.configs").glob("*.json")).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        folder.going(**EVERYTHING)


def test_without_a_terminal_or_yes_nothing_is_removed(folder, capsys, monkeypatch):
    home = folder.training("finetune", "f")
    folder.seen("a.yaml", "finetune/f", days=40)
    folder.seen("a.yaml", days=39)
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        main(["--directory", str(folder.root), "--remove"])
    said = capsys.readouterr().out
    assert "there is no terminal to ask at" in said and "--remove --yes" in said
    assert home.is_dir()
    main(["--directory", str(folder.root), "--remove", "--yes"])
    assert "in 1 folders removed" in capsys.readouterr().out
    assert not home.exists()


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"forget": ["vanila"]}, "--forget: found 'vanila'; there are vanilla; did you mean 'vanilla'?"),
        (
            {"forget_config": ["b.yml"]},
            "--forget-config: found 'b.yml'; there are b.yaml; did you mean 'b.yaml'?",
        ),
    ],
)
def test_a_name_that_does_not_exist_is_named(folder, wishes, message):
    write_json(folder.root / "experiments/vanilla/checkpoint.json", {"runs": {}})
    folder.seen("b.yaml")
    with pytest.raises(UserError) as caught:
        clean(folder.root, [], Wishes(**wishes))
    assert message in str(caught.value)


def test_a_folder_that_no_configuration_has_used_needs_one(folder):
    folder.training("finetune", "f")
    with pytest.raises(SystemExit):
        main(["--directory", str(folder.root)])
