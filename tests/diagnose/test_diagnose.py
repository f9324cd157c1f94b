"""The step that looks into exported checkpoints, and the names of its results."""

import copy

import pandas as pd
import pytest

from llava_ext.analysis.measures import BY_HEAD, BY_LAYER
from tests.support.demo import load_json
from tests.support.workspace import SMALL
from workflow_scripts.config.diagnostics import DiagnosticsSpec
from workflow_scripts.config.evaluation import TaskSpec
from workflow_scripts.config.load import load_config
from workflow_scripts.diagnose import content, step
from workflow_scripts.diagnose.link import link_diagnoses
from workflow_scripts.io import UserError
from workflow_scripts.plan.checks import check_targets
from workflow_scripts.plan.plan import Plan
from workflow_scripts.report import diagnostics, plots
from workflow_scripts.report.collect import collect

TASK = TaskSpec(source="shapes_test")


def diagnosed(folder, export, held_out, **changes):
    """The manifest and the table."""
    manifest = folder / "runs" / "diagnose" / "d" / "manifest.json"
    spec = DiagnosticsSpec(**{"pictures": 6, "batch_size": 4, **changes})
    found = step.diagnose("shapes", spec, TASK, export, held_out[1], manifest)
    assert load_json(manifest) == found
    return manifest, pd.read_parquet(manifest.parent / found["folder"] / step.TABLE)


@pytest.fixture(scope="module", params=["stock_export", "compressed_export"])
def finished(request, tmp_path_factory, held_out):
    folder = tmp_path_factory.mktemp("diagnosed")
    return diagnosed(folder, request.getfixturevalue(request.param), held_out)


def test_every_layer_and_head_is_in_the_table(finished):
    manifest, table = finished
    assert list(table.columns) == ["layer", "head", "measure", "value", "count"]
    assert set(table.measure) == {*BY_HEAD, *BY_LAYER}
    layers = set(table[table.measure == "norm_text"].layer)
    assert layers == set(range(len(layers)))
    heads = table[table.measure == "cmb"]
    assert set(heads.layer) == layers - {0} and set(heads["count"]) == {6}
    assert heads.value.between(0, 1).all() and table[table.measure == "entropy"].value.between(0, 1).all()
    assert load_json(manifest)["prompts"] == 6


def test_batches_change_nothing(tmp_path, stock_export, held_out):
    one, other = (
        diagnosed(tmp_path / str(size), stock_export, held_out, batch_size=size)[1] for size in (1, 6)
    )
    pd.testing.assert_frame_equal(one, other, rtol=1e-3, atol=1e-5)


def test_what_is_measured_is_not_measured_again(tmp_path, stock_export, held_out, monkeypatch):
    manifest, _ = diagnosed(tmp_path, stock_export, held_out)
    monkeypatch.setattr(step, "load_checkpoint", None)  # whoever needed it would fail
    manifest.unlink()
    assert diagnosed(tmp_path, stock_export, held_out, batch_size=1)[0] == manifest


def test_a_layer_that_is_not_there_is_named_and_leaves_nothing(tmp_path, stock_export, held_out):
    with pytest.raises(UserError, match=r"layers: found \[77\]; the language model has layers 1 to"):
        diagnosed(tmp_path, stock_export, held_out, layers=[77])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_numbers_that_are_none_are_refused(tmp_path):
    from llava_ext.analysis.measures import Measurement

    rows = [Measurement(1, 0, "cmb", float("nan"), 3), Measurement(0, None, "norm_text", 1.0, 3)]
    with pytest.raises(UserError, match="not finite: cmb"):
        step.write_table(tmp_path / "t.parquet", rows)
    assert not list(tmp_path.iterdir())


def test_the_report_shows_norms_and_heads(tmp_path, finished):
    manifest, table = finished
    named = tmp_path / "experiments" / "vanilla" / "diagnostics.json"
    link_diagnoses("vanilla", [manifest], named)
    found = collect([named])
    [section] = diagnostics.sections(found, {"vanilla": 0})
    [row] = section["rows"]
    assert row["means"][0] == pytest.approx(table[table.measure == "cmb"].value.mean())
    heads = len(table[table.measure == "cmb"])
    assert section["figure"].count(f"fill: {plots.colour(0)}") == heads
    assert 'role="img" aria-label="shapes: norms' in section["figure"]
    diagnostics.write_table(found, tmp_path)
    written = pd.read_csv(tmp_path / "diagnostics.csv")
    assert len(written) == len(table) and set(written.experiment) == {"vanilla"}


# ---- the plan ----


@pytest.fixture
def planned(small_files):
    def plan(**changes):
        return Plan(load_config({**copy.deepcopy(SMALL), **changes}))

    return plan


def names(plan):
    return {name: item.run.name for (name, _), item in plan.diagnoses.items()}


def test_nothing_is_looked_into_unless_asked_for(planned):
    plan = planned()
    assert not plan.diagnoses
    with pytest.raises(UserError, match="vanilla is not looked into; add the section diagnostics"):
        check_targets(plan, ["experiments/vanilla/diagnostics.json"])
    assert names(planned(diagnostics={})).keys() == SMALL["experiments"].keys()
    assert planned(diagnostics={}).runs == plan.runs  # trainings keep their names


def test_what_is_looked_into_anew(planned, monkeypatch):
    before = names(planned(diagnostics={}))
    assert names(planned(diagnostics={"batch_size": 2, "runtime_min": 5})) == before
    assert not set(names(planned(diagnostics={"pictures": 7})).values()) & set(before.values())
    assert not set(names(planned(diagnostics={"layers": [1]})).values()) & set(before.values())
    asked = copy.deepcopy(SMALL["evaluation"])
    asked["tasks"]["shapes"].update(metric="yes_no", conditions={"permuted": 3})
    assert names(planned(diagnostics={}, evaluation=asked)) == before
    asked["tasks"]["shapes"]["prompt_suffix"] = " Answer shortly."
    assert not set(names(planned(diagnostics={}, evaluation=asked)).values()) & set(before.values())
    monkeypatch.setattr(content, "VERSION", content.VERSION + 1)
    assert not set(names(planned(diagnostics={})).values()) & set(before.values())


def test_diagnostics_need_tasks_that_exist(planned):
    with pytest.raises(UserError, match=r"diagnostics\.tasks\[0\].*'shape'"):
        planned(diagnostics={"tasks": ["shape"]})
    with pytest.raises(UserError, match="only with an evaluation"):
        planned(diagnostics={}, evaluation=None)
