"""A working folder in which tests run the real Snakefile on a configuration smaller than the demo."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tests.support import warm_python

ROOT = Path(__file__).parent.parent.parent
CODE = ("Snakefile", "rules", "workflow_scripts", "llava_ext", "config", "profiles", "slurm", "envs", "docs")

SMALL = {
    "sources": {
        "captions": {
            "kind": "shapes",
            "split": "captions",
            "pictures": 120,
            "archive": "zip",
            "seed": 1,
            "damage": {"truncated": 1, "corrupt": 1, "gif_as_jpg": 1, "empty": 1, "missing": 1},
        },
        # the user's own files, drawn once by the fixture
        "questions": {"kind": "path", "images": "mine/images.tar", "annotations": ["mine/questions.json"]},
        "test": {"kind": "shapes", "split": "test", "pictures": 12, "archive": "folder", "seed": 3},
    },
    "mixtures": {
        "pretrain": {
            "parts": [
                {
                    "annotations": "captions",
                    "images": [{"source": "captions"}],
                    "policy": {"max_dropped_share": 0.1},
                }
            ]
        },
        "finetune": {
            "parts": [
                {
                    "annotations": "questions",
                    "images": [{"prefix": "shapes", "source": "questions"}],
                    "policy": {"max_dropped_share": 0.1},
                }
            ]
        },
    },
    "models": {
        "llm": {"kind": "shapes_llm", "seed": 1},
        "tower": {"kind": "shapes_tower", "seed": 1, "steps": 5},
    },
    "model": {"llm": "llm", "vision_tower": "tower"},
    "compute": {
        "small": {"per_device_batch_size": 8, "cache_pixels_mb": 64, "mem_mb": 2500, "runtime_min": 20}
    },
    "stages": {
        "pretrain": {
            "mixture": "pretrain",
            "compute": "small",
            "prompt_version": "plain",
            "image_aspect_ratio": "square",
            "learning_rate": 5e-3,
            "max_steps": 6,
            "global_batch_size": 8,
            "model_max_length": 256,
            "save_steps": 3,
        },
        "finetune": {
            "mixture": "finetune",
            "compute": "small",
            "prompt_version": "v1",
            "group_by_modality_length": True,
            "learning_rate": 5e-3,
            "max_steps": 8,
            "global_batch_size": 8,
            "model_max_length": 256,
            "save_steps": 4,
        },
    },
    "experiments": {
        "vanilla": {},
        "gentle": {"finetune": {"learning_rate": 1e-3}},
        "compress_4": {"interventions": {"compression_after_projection": True, "final_spatial_size": 4}},
    },
    "evaluation": {
        "tasks": {"shapes": {"source": "test", "pictures": 6, "examples": 2, "max_empty_share": 1}}
    },
}


def draw_questions(folder, pictures=120):
    """The user's own archive and annotations."""
    from workflow_scripts.config.shapes import ShapesSource
    from workflow_scripts.demo.shapes import generate

    folder.mkdir(parents=True, exist_ok=True)
    spec = ShapesSource(split="questions", pictures=pictures, archive="tar", seed=2, text_only=8)
    found = generate(spec, folder)
    assert (folder / "images.tar").is_file(), found
    if not (folder / "questions.json").is_file():
        (folder / found["annotations"][0]["path"]).rename(folder / "questions.json")


class Workspace:
    """A working folder with its configuration and the code that runs in it."""

    def __init__(
        self, folder, code=ROOT, options=(), snakemake=("-m", "snakemake"), environment=None, warm=False
    ):
        """``warm``: what `run` starts has its libraries loaded (tests/support/warm_python.py)."""
        self.folder = Path(folder)
        self.code = Path(code)
        self.options = list(options)
        self.snakemake = list(snakemake)
        self.extra_environment = dict(environment or {})
        self.warm = warm
        self.config = copy.deepcopy(SMALL)

    def draw(self):
        draw_questions(self.folder / "mine")
        return self

    def copy_to(self, folder, code=None):
        """The same folder elsewhere, times kept, as `mv` or `rsync -a` leave it."""
        shutil.copytree(self.folder, folder, symlinks=True, copy_function=shutil.copy2)
        other = Workspace(
            folder,
            code or (Path(folder) if self.code == self.folder else self.code),
            self.options,
            self.snakemake,
            self.extra_environment,
            self.warm,
        )
        other.config = copy.deepcopy(self.config)
        return other

    def command(self, *arguments):
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.config, sort_keys=False))
        cores = [] if any("profile" in option for option in self.options) else ["--cores", "2"]
        base = [sys.executable, *self.snakemake, "-s", self.code / "Snakefile", "--configfile", path, *cores]
        return [str(item) for item in [*base, *self.options, *arguments]]

    def environment(self):
        return {
            **os.environ,
            **self.extra_environment,
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def start(self, *arguments):
        """Snakemake in the background, in its own process group, its output in `snakemake.out`."""
        out = (self.folder / "snakemake.out").open("wb")
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )

    def run(self, *arguments, check=True, timeout=600, stdin=None):
        _, *words = self.command(*arguments)
        warm = self.warm and self.code == ROOT
        done = subprocess.run(
            [warm_python.python() if warm else sys.executable, *words],
            cwd=self.folder,
            env=self.environment(),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stdout[-6000:]
        return done

    def planned(self, *arguments):
        """What a dry run would make: `rule: output` for each job, sorted."""
        output = self.run("-n", *arguments).stdout
        jobs = re.findall(r"^(?:local)?rule (\w+):\n(?:    .*\n)*?    output: (.*)$", output, flags=re.M)
        if not jobs:
            assert "Nothing to be done" in output, output[-3000:]
        return sorted(f"{rule}: {made}" for rule, made in jobs)

    def json(self, path):
        return json.loads((self.folder / path).read_text())

    def run_folder(self, stage, experiment):
        return self.folder / Path(self.plan().run(stage, experiment).folder)

    def state(self, stage, experiment):
        """The state folder of a training, as soon as it exists."""
        found = list(self.run_folder(stage, experiment).glob("*/spec.json"))
        return found[0].parent if found else None

    def plan(self):
        from workflow_scripts.config.load import load_config
        from workflow_scripts.plan.plan import Plan

        here = Path.cwd()
        os.chdir(self.folder)
        try:
            return Plan(load_config(self.config))
        finally:
            os.chdir(here)


def copy_code(folder):
    """A clone of the code, without what git ignores."""
    for name in CODE:
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__")
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignore)
        elif source.exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    return folder


def wait_for(condition, seconds, what, process=None):
    """Waits until ``condition()`` is true and returns its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        if process is not None and process.poll() is not None:
            assert condition(), f"snakemake ended while waiting for {what}"  # it may have come true just then
        time.sleep(0.1)
    raise AssertionError(f"{what} did not happen within {seconds} s")


def kill_group(process, number=signal.SIGKILL):
    """Kills Snakemake alone, not its jobs: they run in the same group but only its process is named."""
    os.kill(process.pid, number)
    process.wait()


def spoil_a_picture(workspace, mixture, order, step, batch=8):
    """Changes some bytes of a picture that a training in that order meets in that step, or soon after where
    the step has no picture; gives its record's number. Nothing else of the file is another.
    """
    from llava_ext.data.sampler import EpochSampler
    from llava_ext.data.samples import open_samples

    store = open_samples(workspace.folder / f"data/mixtures/{mixture}/samples.json")
    met = EpochSampler(store.lengths, order, batch, 1, 42).order()[(step - 1) * batch :]
    index = next(index for index in met if len(store._rows(index)))
    row = store._rows(index)[0]
    path = Path(store._stores[row["store"]].path)
    assert workspace.folder in path.absolute().parents
    before = path.stat()
    with path.open("r+b") as stream:
        stream.seek(int(row["offset"]) + 20)
        stream.write(b"spoilt")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return index + 1
