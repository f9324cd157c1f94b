"""Others' pictures and questions go through the workflow by what docs/data.md says, and by nothing else."""

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap

import pytest

from llava_ext.data.samples import open_samples
from tests.support import warm_python
from tests.support.workspace import ROOT
from workflow_scripts.io import read_json

pytestmark = pytest.mark.slow


def blocks():
    """The indented blocks of the section, in their order: commands, a script, a configuration, commands."""
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    section = page.partition("<!-- own data")[2].partition("<!-- end of own data")[0]
    found = re.findall(r"(?:^(?:    .*)?\n)+", section, flags=re.MULTILINE)
    return [textwrap.dedent(block).strip() for block in found if block.strip()]


def run(command, folder):
    """A command of the docs, as somebody types it in a folder beside the code."""
    program, *words = shlex.split(command)
    own = {
        "python": [sys.executable],
        "snakemake": [warm_python.python(), "-m", "snakemake", "-s", str(ROOT / "Snakefile")],
    }
    return subprocess.run(
        [*own[program], *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )


def test_easy_vqa_is_trained_on_by_the_docs_alone(tmp_path):
    fetch, script, config, commands = blocks()
    if (done := run(fetch, tmp_path)).returncode:
        pytest.skip(f"no registry gives easy-vqa here: {done.stdout.strip().splitlines()[-1:]}")
    (tmp_path / "to_llava.py").write_text(script)
    (tmp_path / "mine.yaml").write_text(config)
    assert run("python to_llava.py", tmp_path).returncode == 0
    dry, real = commands.splitlines()
    planned = run(dry, tmp_path)
    assert planned.returncode == 0 and "2 of 2 trainings are to be done" in planned.stdout, planned.stdout[
        -3000:
    ]
    done = run(real, tmp_path)
    assert done.returncode == 0, done.stdout[-5000:]

    assert read_json(tmp_path / "data/scans/easy_vqa/manifest.json")["counts"]["ok"] == 5000
    for name in ("captions", "dialogues"):
        [part] = read_json(tmp_path / f"data/mixtures/{name}/manifest.json")["parts"]
        assert part["dropped"] == {} and "findings" not in part
        assert part["roots"] == [
            {"prefix": "train", "root": "easy_vqa/data/train/images", "source": "easy_vqa"}
        ]
    store = open_samples(tmp_path / "data/mixtures/dialogues")
    asked = json.loads((tmp_path / "dialogues.json").read_text())
    assert len(store) == len(asked) == 4000 and store.record(7) == asked[7]
    assert sum(len(record["conversations"]) for record in asked) == 2 * 38575
    checkpoint = read_json(tmp_path / "experiments/vanilla/checkpoint.json")
    assert (tmp_path / "experiments/vanilla" / checkpoint["paths"]["hf"] / "model.safetensors").is_file()
