"""The real Snakefile from data to named checkpoints, on a configuration smaller than the demo."""

import json
import os
import pty
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from tests.support.workspace import ROOT, Workspace
from workflow_scripts.status.read import all_statuses

pytestmark = pytest.mark.slow


def test_every_experiment_has_a_checkpoint_that_stock_transformers_loads(finished):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    for name in ("vanilla", "gentle", "compress_4"):
        content = finished.json(f"experiments/{name}/checkpoint.json")
        assert content["experiment"] == name
        folder = finished.folder / "experiments" / name / content["paths"]["hf"]
        assert (folder / "model.safetensors").is_file() and (folder / "provenance.json").is_file()
        assert (finished.folder / "experiments" / name / "llava" / "config.json").is_file()
    model, loading = LlavaForConditionalGeneration.from_pretrained(
        finished.folder / "experiments/vanilla/hf", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert AutoProcessor.from_pretrained(finished.folder / "experiments/vanilla/hf")
    assert model.config.model_type == "llava"


def test_stage_1_is_shared_where_it_is_the_same(finished):
    runs = {
        name: finished.json(f"experiments/{name}/checkpoint.json")["runs"]
        for name in ("vanilla", "gentle", "compress_4")
    }
    assert runs["vanilla"]["pretrain"] == runs["gentle"]["pretrain"] != runs["compress_4"]["pretrain"]
    assert len({run["finetune"] for run in runs.values()}) == 3
    assert len(list((finished.folder / "runs/pretrain").iterdir())) == 2


def test_the_flags_reach_the_checkpoint(finished):
    config = finished.json("experiments/compress_4/hf/config.json")
    text = json.dumps(config)
    assert '"compression_after_projection": true' in text and '"final_spatial_size": 4' in text
    rate = finished.json("experiments/gentle/finetune/provenance.json")["configuration"]["recipe"][
        "learning_rate"
    ]
    assert rate == 1e-3


def test_provenance_says_where_a_checkpoint_comes_from(finished):
    found = finished.json("experiments/vanilla/finetune/provenance.json")
    assert found["global_batch_size"] == 8 and found["step"] == 8
    assert set(found["inputs"]) == {"mixture", "llm", "vision_tower", "parent"}
    assert found["inputs"]["mixture"] == finished.json("data/mixtures/finetune/manifest.json")["digest"]
    assert "torch" in found["versions"] and found["hardware"]["cpus"]


def test_the_end_says_where_the_results_are(finished):
    end = finished.output[finished.output.index("checkpoints (") :]
    assert "experiments/vanilla/hf" in end
    assert "accuracy" in end
    assert str(finished.folder / "report/index.html") in end


def test_logs_and_manifests_are_kept_and_hold_no_absolute_paths(finished):
    assert list(finished.folder.glob("logs/finetune/*.log"))
    for path in finished.folder.glob("runs/*/*/manifest.json"):
        assert str(finished.folder) not in path.read_text(), path


def test_the_second_run_has_nothing_to_do(finished):
    done = finished.run()
    assert "Nothing to be done" in done.stdout


def test_status_reads_the_run_folders(finished):
    found = {item.run: item for item in all_statuses(finished.folder)}
    assert len(found) == 5
    assert all(
        item.state == "finished" and item.step == item.steps and item.attempts == 1 for item in found.values()
    )
    assert all(item.loss is not None and item.tokens_per_s for item in found.values())


def answered(workspace, answer, *arguments):
    """Snakemake at a terminal, where somebody answers its question; what it printed."""
    terminal, inside = pty.openpty()
    os.write(terminal, f"{answer}\n".encode())
    output = workspace.run(*arguments, stdin=inside, timeout=120).stdout
    os.close(terminal)
    os.close(inside)
    return output


def grow_old(folder, days=30):
    """As if nothing in the folder had been used for so long; the records of starts too."""
    then = time.time() - days * 86400
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (then, then), follow_symlinks=False)
    for path in folder.glob("runs/.configs/*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"time": then}))


def test_unused_runs_are_listed_and_removed_when_somebody_agrees(finished, tmp_path):
    workspace = finished.copy_to(tmp_path / "w")
    gentle = str(finished.run_folder("finetune", "gentle").relative_to(finished.folder))
    del workspace.config["experiments"]["gentle"]
    # The finished experiment's own file still names its run, so nothing is removed behind the user's back.
    assert "every run is used" in workspace.run("list_unused").stdout
    (workspace.folder / "experiments/gentle/checkpoint.json").unlink()
    listed = workspace.run("list_unused").stdout
    assert (
        f"{gentle}  (config.yaml does not ask for it any more; kept: it was used in the last 14 days"
        in listed
    )
    grow_old(workspace.folder)
    assert "nothing is removed: there is no terminal to ask at" in workspace.run("clean_unused").stdout
    assert "nothing is removed" in answered(workspace, "n", "clean_unused")
    assert (workspace.folder / gentle).is_dir()
    # its stage 2, its export, its predictions and scores
    assert "in 4 folders removed" in answered(workspace, "y", "clean_unused")
    assert not (workspace.folder / gentle).exists()
    assert workspace.run_folder("pretrain", "vanilla").is_dir()
    assert workspace.planned() == ["report: report/index.html"]


def test_a_run_of_another_configuration_is_never_taken_for_unused(finished, tmp_path):
    """Also when that configuration's file is gone, and its runs are old."""
    workspace = finished.copy_to(tmp_path / "w")
    other = workspace.folder / "other.yaml"
    other.write_text(yaml.safe_dump(workspace.config))
    shutil.rmtree(workspace.folder / "runs/.configs")
    shutil.rmtree(workspace.folder / "experiments")
    workspace.run("list_unused", "--configfile", str(other))
    other.unlink()
    grow_old(workspace.folder)
    del workspace.config["experiments"]["gentle"]
    assert "every run is used" in workspace.run("list_unused").stdout
    command = ["-m", "workflow_scripts.clean", "--configfile", "config.yaml", "--forget-config", "other.yaml"]
    environment = workspace.environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=workspace.folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "other.yaml does not ask for it any more" in done.stdout, done


def test_an_unknown_target_names_the_known_ones(finished):
    done = finished.run("experiments/vanila/checkpoint.json", "-n", check=False)
    assert done.returncode != 0
    assert "experiments: compress_4, gentle, vanilla; did you mean 'vanilla'?" in done.stdout
    assert "Traceback" not in done.stdout


def test_several_nodes_in_a_container_are_refused_before_anything_waits_in_a_queue(tmp_path):
    workspace = Workspace(tmp_path).draw()
    workspace.config["compute"]["small"].update(nodes=2, parallel="ddp", per_device_batch_size=4)
    done = workspace.run("-n", "--sdm", "apptainer", check=False)
    assert "compute.small.nodes: found 2" in done.stdout and "inside a container it must be 1" in done.stdout
