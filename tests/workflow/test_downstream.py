"""docs/downstream.md, to the letter: another Snakefile that plots results, among them those of a checkpoint
that this workflow did not train.
"""

from __future__ import annotations

import copy
import re
import subprocess

import pandas as pd
import pytest
import yaml
from PIL import Image

from tests.support import warm_python
from tests.support.workspace import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def downstream(finished, tmp_path_factory):
    """A folder with the page's Snakefile and script; in `llava` is what the module has done so far. The
    experiment `published` is vanilla's exported checkpoint, named as if it came from elsewhere.
    """
    folder = tmp_path_factory.mktemp("downstream")
    finished.copy_to(folder / "llava")
    (folder / "mine").symlink_to("llava/mine")
    snakefile, script = re.findall(r"^```python\n(.*?)^```$", page(), flags=re.DOTALL | re.MULTILINE)[:2]
    (folder / "Snakefile").write_text(snakefile.replace("/path/to/this/clone", str(ROOT)))
    (folder / "plot.py").write_text(script)
    config = copy.deepcopy(finished.config)
    theirs = str(finished.folder / "experiments/vanilla/hf")
    config["models"]["theirs"] = {"kind": "path", "role": "checkpoint", "path": theirs}
    config["experiments"]["published"] = {"checkpoint": "theirs"}
    config["diagnostics"] = {"pictures": 2, "layers": [1], "batch_size": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump({"llava": config}))
    return folder


def page():
    return (ROOT / "docs/downstream.md").read_text(encoding="utf-8")


def run(folder, finished, *arguments):
    triggers = ["--rerun-triggers", "mtime", "input", "params"]
    command = [warm_python.python(), "-m", "snakemake", "--cores", "2", *triggers, *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=finished.environment(),
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_the_example_makes_what_is_missing_and_plots_it(downstream, finished):
    from workflow_scripts.io import read_json

    said = run(downstream, finished)
    made = set(re.findall(r"^(?:local)?rule (\w+):$", said, flags=re.MULTILINE))
    # nothing is trained: what the module has finished stays
    fresh = {"prepare_model", "export", "predict", "score", "evaluation", "diagnose", "diagnostics"}
    assert made == {"plot"} | {f"llava_{name}" for name in fresh}
    with Image.open(downstream / "figure.png") as figure:
        assert figure.width > 300 and len(figure.convert("L").getcolors()) > 50
    rows = pd.read_csv(downstream / "answers.csv", keep_default_na=False)
    both = rows.pivot(index=["question", "condition"], columns="experiment", values="answer")
    assert set(rows.experiment) == {"vanilla", "published"} and len(both) > 10
    assert (both.vanilla == both.published).all(), "the same weights, whoever names them"
    tables = {}
    for name in ("vanilla", "published"):
        path = downstream / f"llava/experiments/{name}/diagnostics.json"
        found = read_json(path)["diagnostics"]["shapes"]
        assert found["prompts"] == 2
        tables[name] = pd.read_parquet(path.parent / found["table"])
    pd.testing.assert_frame_equal(tables["vanilla"], tables["published"])
    assert {"norm_vision", "cmb", "rope_logit", "permuted_token"} <= set(tables["vanilla"].measure)
    assert set(tables["vanilla"].dropna(subset="head").layer) == {1}
    assert "Nothing to be done" in run(downstream, finished, "-n")
