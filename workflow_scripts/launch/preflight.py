"""Checks on every machine of a job before a model is loaded: GPUs, versions, trackers, shared paths, the
first machine's name.

`python -m workflow_scripts.launch.preflight --expect JSON` runs on each machine and writes what it found
beside the training's state; the launcher reads the answers and names the machine that fails.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from workflow_scripts.command_line import command_line
from workflow_scripts.config.compute import ComputeSpec
from workflow_scripts.io import UserError, write_json
from workflow_scripts.launch import slurm
from workflow_scripts.launch.command import Nodes, srun

ANSWER_S = 300.0
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that training depends on; absent ones are left out."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Gpus:
    """The GPUs that torch can use in a process of this environment, by name; ``why``: the reason where
    there is none.
    """

    names: tuple[str, ...] = ()
    bf16: bool = False
    build: str = "torch"
    why: str = ""


ASK_TORCH = """
import json, torch
found = {"names": [], "bf16": False, "build": f"torch {torch.__version__}", "why": ""}
try:
    torch.cuda.init()
    found["names"] = [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]
    found["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
except Exception as error:
    found["why"] = str(error).strip().splitlines()[0]
print(json.dumps(found))
"""


def visible_gpus(timeout_s: float = 180.0) -> Gpus:
    """Asks torch in a process of its own, which holds no memory of a GPU afterwards and may hang on a sick
    one.

    A driver's list would not do: the driver may be too old for this torch, torch may be built for the CPU,
    and a job may hold a part of a GPU (MIG).
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, timeout=timeout_s, check=True
        )
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return Gpus(why=f"torch did not answer within {timeout_s:g} s; is a GPU of this machine ill?")
    except (subprocess.CalledProcessError, ValueError) as error:
        said = str(getattr(error, "stderr", error)).strip().splitlines()
        return Gpus(why=f"torch can't be loaded: {said[-1] if said else error}")
    return Gpus(tuple(found["names"]), found["bf16"], found["build"], found["why"])


def gpus_of_driver() -> str:
    """How many GPUs the driver lists, whatever torch can do with them."""
    if shutil.which("nvidia-smi") is None:
        return "there is no nvidia-smi"
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return "nvidia-smi does not answer"
    return f"nvidia-smi lists {sum(line.startswith('GPU ') for line in done.stdout.splitlines())}"


def gpu_problems(wanted: int, precision: str) -> list[str]:
    """What the GPUs of this machine lack for ``wanted`` processes in that precision, in words."""
    if not wanted:
        return []
    gpus = visible_gpus()
    if len(gpus.names) < wanted:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        limited = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible}"
        why = f": {gpus.why}" if gpus.why else ""
        return [
            f"{len(gpus.names)} GPUs are visible, {wanted} are needed ({gpus.build}{why};"
            f" {gpus_of_driver()}{limited})"
        ]
    if precision == "bf16" and not gpus.bf16:
        return [f"precision: bf16 can't be computed by {gpus.names[0]}; set precision: fp16"]
    return []


def importable(package: str) -> bool:
    """Whether a package is installed, without loading it. A folder of its name is none: W&B makes one
    where it runs.
    """
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def tracker_problem(stage: str, tracker: str) -> str:
    """The message for a tracker that the configuration names and that is not installed."""
    return (
        f"stages.{stage}.report_to names {tracker}, but {sys.executable} has no package {tracker}; "
        f"install it (`{Path(sys.executable).name} -m pip install {tracker}`) or take it out of report_to"
    )


def expectations(
    compute: ComputeSpec,
    paths: Sequence[Path],
    address: str,
    token: Path | None,
    trackers: Sequence[str] = (),
    stage: str = "",
) -> dict[str, Any]:
    """What each machine must have."""
    return {
        "gpus": compute.gpus_per_node,
        "precision": compute.precision,
        "versions": versions(),
        "trackers": list(trackers),
        "stage": stage,
        "paths": [str(path.absolute()) for path in paths],
        "address": address,
        "token": str(token.absolute()) if token else None,
        "value": token.read_text() if token else None,
    }


def problems_here(expected: Mapping[str, Any]) -> list[str]:
    """What this machine lacks, in words."""
    found = []
    found += gpu_problems(expected["gpus"], expected["precision"])
    here = versions()
    for name, wanted in expected["versions"].items():
        if here.get(name) != wanted:
            found.append(
                f"{name} is {here.get(name, 'missing')}, the first machine has {wanted}: use one environment"
                " for all"
            )
    found += [
        tracker_problem(expected["stage"], name) for name in expected["trackers"] if not importable(name)
    ]
    missing = [path for path in expected["paths"] if not Path(path).exists()]
    if missing:
        found.append(
            f"{', '.join(missing)} can't be seen here: it must lie on a file system that all machines share"
        )
    token = expected["token"]
    if token and (not Path(token).is_file() or Path(token).read_text() != expected["value"]):
        found.append(
            f"{token} is not the file that the first machine wrote: the working folder is not shared"
        )
    try:
        socket.getaddrinfo(expected["address"], None)
    except OSError:
        found.append(f"the name of the first machine, {expected['address']}, can't be resolved here")
    return found


def check_all(
    spec: Mapping[str, Any], compute: ComputeSpec, nodes: Nodes, paths: Sequence[Path], state: Path
) -> None:
    """Checks every machine. Raises UserError that names those which fail, and why."""
    wanted = (spec["recipe"]["report_to"], spec["stage"])
    if compute.nodes == 1:
        found = problems_here(expectations(compute, paths, "localhost", None, *wanted))
        if found:
            name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
            lines = "\n  ".join(found)
            raise UserError(f"{name} can't compute this training:\n  {lines}" + advice_to_exclude([name]))
        return
    folder = state / "preflight"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    token = folder / "token"
    token.write_text(f"{time.time_ns()}")
    expected = json.dumps(expectations(compute, paths, nodes.address, token, *wanted))
    command = [*srun(compute.nodes, 1), "bash", "-c"]
    command.append(f'exec "$0" -m {__name__} --node "$SLURMD_NODENAME" --expect "$1"')
    try:
        done = subprocess.run(
            [*command, sys.executable, expected],
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        late = f"not all machines answered within {ANSWER_S:g} s"
        done = subprocess.CompletedProcess(command, 1, "", late)
    _judge(nodes, folder, done)


def advice_to_exclude(machines: Sequence[str]) -> str:
    """How to go on without machines that lack something, in a job of Slurm: its next attempt may come to
    the same ones.
    """
    if not machines or not slurm.job_id():
        return ""
    names = ",".join(machines)
    return f"\nTo go on without: the same snakemake command with --slurm-exclude-failed-nodes {names}"


def _judge(nodes: Nodes, folder: Path, done: subprocess.CompletedProcess[str]) -> None:
    found = {}
    for name in nodes.names:
        answer = folder / f"{name}.json"
        found[name] = json.loads(answer.read_text())["problems"] if answer.is_file() else ["no answer"]
    lines = [f"{name}: {problem}" for name, problems in found.items() for problem in problems]
    if lines or done.returncode:
        said = (
            f"\nsrun said: {done.stderr.strip()[-1000:]}" if done.returncode and done.stderr.strip() else ""
        )
        raise UserError(
            "not all machines of the job can compute this training:\n  "
            + "\n  ".join(lines or ["srun failed"])
            + said
            + advice_to_exclude([name for name, problems in found.items() if problems])
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Checks this machine and writes the answer beside the token."""
    parser = command_line("launch.preflight", __doc__)
    parser.add_argument("--expect", required=True, help="what the machine must have, as JSON")
    parser.add_argument("--node", default=socket.gethostname(), help="the machine's name in Slurm")
    arguments = parser.parse_args(argv)
    expected = json.loads(arguments.expect)
    found = problems_here(expected)
    folder = Path(expected["token"]).parent
    if not folder.is_dir():  # not a shared file system: stderr is the only way to say so
        print(
            f"{arguments.node}: {folder} does not exist here; the working folder is not shared",
            file=sys.stderr,
        )
        raise SystemExit(1)
    write_json(folder / f"{arguments.node}.json", {"problems": found})


if __name__ == "__main__":
    main()
