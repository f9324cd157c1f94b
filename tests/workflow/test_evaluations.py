"""Evaluations through the real Snakefile: results by readable names, shards as jobs of their own."""

import pandas as pd
import pytest

pytestmark = pytest.mark.slow

TARGET = "experiments/vanilla/evaluation/shapes.json"


def rows_of(workspace):
    content = workspace.json(TARGET)
    return pd.read_parquet((workspace.folder / TARGET).parent / content["paths"]["predictions"])


def test_results_have_readable_names(finished):
    content = finished.json("experiments/compress_4/evaluation/shapes.json")
    assert content["experiment"] == "compress_4" and content["source"]["name"] == "test"
    assert content["checkpoint"]["run"] == finished.plan().run("export", "compress_4").name
    assert finished.json("experiments/gentle/comparison.json")["baseline"] == "vanilla"
    rows = rows_of(finished)
    assert set(rows.condition) == {"normal", "permuted", "blank"}
    assert len(rows) == 3 * finished.json(TARGET)["questions"]
    for name in ("accuracy.csv", "accuracy.parquet", "differences.csv", "differences.parquet"):
        assert (finished.folder / "report" / name).is_file()


def test_shards_are_jobs_of_their_own_with_the_same_answers(finished, tmp_path):
    workspace = finished.copy_to(tmp_path / "w")
    run = workspace.plan().evaluations["vanilla", "shapes"].predict
    before, digest = rows_of(workspace), workspace.json(run.manifest)["digest"]
    workspace.config["evaluation"]["tasks"]["shapes"].update(shards=2, batch_size=2)
    for path in (workspace.folder / run.folder).rglob("*.*"):
        path.unlink()
    said = workspace.run("--force", run.manifest).stdout
    assert said.count("rule predict_shard:") == 2
    assert len(list((workspace.folder / run.folder).glob("shard-*-of-2.json"))) == 2
    assert workspace.json(run.manifest)["digest"] == digest
    pd.testing.assert_frame_equal(rows_of(workspace), before)
    # the same content: nothing is scored again, and one job instead of two is no reason to ask again
    assert workspace.planned() == []
    workspace.config["evaluation"]["tasks"]["shapes"].update(shards=1)
    assert workspace.planned() == []


def test_a_task_that_nobody_is_asked_is_named_with_those_there_are(finished):
    done = finished.run("experiments/vanilla/evaluation/shape.json", "-n", check=False)
    assert "vanilla is not asked 'shape'; tasks: shapes; did you mean 'shapes'?" in done.stdout
