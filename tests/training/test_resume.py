"""Checkpoints are complete or absent; a damaged one is seen and the one before it used."""

import subprocess
import sys

import pytest

from llava_ext.errors import TrainingError
from llava_ext.training import claim, identity, states
from tests.support.trainings import REPOSITORY


def save(output_dir, step, content=b"weights"):
    folder = states.staging(output_dir, step)
    (folder / "deep").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(content * 1000)
    (folder / "deep" / "state.bin").write_bytes(content)
    states.seal(folder, output_dir / f"checkpoint-{step}", step, world_size=1)
    return output_dir / f"checkpoint-{step}"


def test_sealed_checkpoint_is_good(tmp_path):
    path = save(tmp_path, 10)
    assert states.last_good(tmp_path) == states.Checkpoint(path, 10)
    assert states.Checkpoint(path, 10).facts["world_size"] == 1
    assert not list(tmp_path.glob(".saving*"))


def flip_a_byte(path):
    data = bytearray((path / "weights.bin").read_bytes())
    data[500] ^= 1
    (path / "weights.bin").write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "weights.bin").write_bytes(b"short"),
        lambda path: (path / "deep" / "state.bin").unlink(),
        lambda path: (path / states.MARKER).unlink(),
        lambda path: (path / states.MARKER).write_text('{"step": 20, "fi'),
        flip_a_byte,
    ],
)
def test_damaged_newest_is_set_aside_and_the_one_before_used(tmp_path, damage, capsys):
    save(tmp_path, 10)
    damage(save(tmp_path, 20))
    assert states.last_good(tmp_path).step == 10
    assert (tmp_path / "damaged-checkpoint-20").is_dir()
    assert "checkpoint-20: not usable" in capsys.readouterr().err


def test_order_is_by_step_not_by_name_or_time(tmp_path):
    save(tmp_path, 100)
    save(tmp_path, 9)
    assert states.last_good(tmp_path).step == 100


def test_unfinished_save_is_invisible_and_cleared(tmp_path):
    save(tmp_path, 10)
    stale = states.staging(tmp_path, 20)
    stale.mkdir()
    (stale / "weights.bin").write_bytes(b"half")
    assert states.last_good(tmp_path).step == 10
    states.clear_staging(tmp_path)
    assert not stale.exists()


def test_pruning_never_counts_a_damaged_one(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    (tmp_path / "checkpoint-30" / "weights.bin").unlink()
    states.prune(tmp_path, 1)
    assert states.last_good(tmp_path).step == 20
    assert not (tmp_path / "checkpoint-10").exists()


def test_pruning_keeps_all_without_a_limit(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
    states.prune(tmp_path, None)
    assert [item.step for item in states.checkpoints(tmp_path)] == [20, 10]


def test_another_configuration_is_refused_by_key(tmp_path):
    identity.check_identity(tmp_path, {"learning_rate": 1e-3, "seed": 1})
    identity.check_identity(tmp_path, {"learning_rate": 2e-3, "seed": 1})  # nothing was trained yet
    save(tmp_path, 10)
    with pytest.raises(TrainingError, match=r"learning_rate: 0.002 when it was started, now 0.005"):
        identity.check_identity(tmp_path, {"learning_rate": 5e-3, "seed": 1})
    identity.check_identity(tmp_path, {"learning_rate": 2e-3, "seed": 1})


def test_finished_means_that_the_files_are_there(tmp_path):
    assert states.finished(tmp_path) is None
    final = tmp_path / ".saving-final"
    final.mkdir()
    (final / "model.safetensors").write_bytes(b"x" * 10)
    digests, sizes = states.publish(final, tmp_path)
    states.write_result(tmp_path, "finished", 5, files=digests, bytes=sizes)
    assert states.finished(tmp_path)["step"] == 5
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert states.finished(tmp_path) is None
    states.write_result(tmp_path, "interrupted", 5)
    assert states.finished(tmp_path) is None


def test_folder_digest_sees_content_and_not_the_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "README.md").write_text(name)
    assert identity.folder_digest(tmp_path / "a") == identity.folder_digest(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text("[]")
    assert identity.folder_digest(tmp_path / "a") != identity.folder_digest(tmp_path / "b")


def test_ranks_share_the_reading_of_a_checkpoint(tmp_path):
    """Two ranks in step: each reads the files that the other does not, and either finds the damage."""
    save(tmp_path, 10)
    flip_a_byte(save(tmp_path, 20))
    newest = states.checkpoints(tmp_path)[0]
    found = [newest.problem(share=(rank, 2)) for rank in range(2)]
    assert len([text for text in found if text is None]) == 1 and newest.problem() in found
    gathered = iter([found, [None, None]])
    good = states.last_good(tmp_path, (0, 2), lambda work: work(), lambda mine: next(gathered))
    assert good.step == 10 and (tmp_path / "damaged-checkpoint-20").is_dir()


def test_every_file_is_read_by_a_rank_that_sees_it():
    seen = [["a", "b", "c"], ["a", "c", "d"], []]
    dealt = states.shares(seen)
    assert sorted(name for names in dealt for name in names) == ["a", "b", "c", "d"]
    assert all(set(mine) <= set(names) for mine, names in zip(dealt, seen, strict=True))
    assert states.shares([["a", "b"]]) == [["a", "b"]]


def test_one_training_a_folder(tmp_path):
    """Another process is refused while the first lives, and may go on at once when it was killed."""
    script = (
        "from pathlib import Path; from llava_ext.training.claim import check_claim, claim\n"
        f"f = Path({str(tmp_path)!r}); claim(f, 0.1); check_claim(f); print('mine', flush=True); input()"
    )

    def another():
        return subprocess.Popen(
            [sys.executable, "-c", script], stdin=-1, stdout=-1, stderr=-1, text=True, cwd=REPOSITORY
        )

    first = another()
    assert first.stdout.readline() == "mine\n"
    second = another()
    assert second.wait(30) == 1 and f"process {first.pid} on" in second.stderr.read()
    assert claim.holder(tmp_path).startswith(f"process {first.pid} on")
    first.kill()
    first.wait()
    third = another()
    assert third.stdout.readline() == "mine\n"
    third.communicate("\n")
