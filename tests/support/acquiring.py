"""The real acquire command in a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from workflow_scripts.io import read_json

ROOT = Path(__file__).parents[2]


class Acquiring:
    """A working folder, and an environment that reaches only the test's servers."""

    def __init__(self, folder, endpoint="http://127.0.0.1:9", step="acquire"):
        self.folder, self.step = folder, step
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        self.env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT)}
        self.env["HF_HUB_DISABLE_TELEMETRY"] = "1"

    @property
    def data(self):
        return self.folder / "data" / "sources" / "N"

    def command(self, spec):
        options = ["--name", "N", "--spec", json.dumps(spec), "--manifest", str(self.data / "manifest.json")]
        return [sys.executable, "-m", f"workflow_scripts.{self.step}", *options]

    def start(self, spec, **env):
        """In the background; what it says comes in a pipe."""
        return subprocess.Popen(
            self.command(spec), cwd=self.folder, env=self.env | env, stderr=subprocess.PIPE, text=True
        )

    def acquire(self, spec, **env):
        done = subprocess.run(
            self.command(spec),
            cwd=self.folder,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def manifest(self):
        return read_json(self.data / "manifest.json")
