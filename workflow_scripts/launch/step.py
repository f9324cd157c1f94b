"""Runs one training to its end: finds its state, makes sure that nobody else computes it, continues,
publishes.

    python -m workflow_scripts.launch --spec JSON --mixture data/mixtures/M/manifest.json \\
        --models models/LLM/manifest.json models/TOWER/manifest.json [--parent runs/pretrain/R/manifest.json]
        \\ --manifest runs/finetune/R/manifest.json

Everything of the training lies in `<folder of the manifest>/<state key>/`, which no workflow engine deletes.
The manifest comes last. The exit status is 0 only when the training is finished; after a signal it has saved
and the next attempt continues; after a verdict (verdicts.py) there is none.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ext.model.interventions import Interventions
from workflow_scripts.command_line import command_line
from workflow_scripts.config.base import StrictModel
from workflow_scripts.config.compute import ComputeSpec
from workflow_scripts.config.models import ModelSection
from workflow_scripts.config.stages import StageSpec
from workflow_scripts.io import UserError, digest, read_json, user_errors, write_json
from workflow_scripts.launch import attempts, slurm, verdicts
from workflow_scripts.launch.command import (
    Inputs,
    Nodes,
    tracking_environment,
    training_command,
    training_environment,
    training_flags,
)
from workflow_scripts.launch.ownership import OWNER, PATIENCE_S, Ownership, alive, why_left_alone
from workflow_scripts.launch.preflight import check_all
from workflow_scripts.launch.process import Training
from workflow_scripts.launch.provenance import provenance
from workflow_scripts.stages import STAGES
from workflow_scripts.survey.layout import image_layout

RESULT = "train_result.json"
# The folder in which a stage leaves the vision tower that it has trained, for the next one to begin with.
TOWER = "vision_tower"
# EX_TEMPFAIL: saved, to be continued.
INTERRUPTED = 75


@dataclass(frozen=True)
class Job:
    """A training: what is wanted, from what, and where it goes."""

    spec: Mapping[str, Any]
    inputs: Inputs
    digests: Mapping[str, str]
    manifest: Path

    @property
    def compute(self) -> ComputeSpec:
        """The kind of job."""
        return ComputeSpec.model_validate(self.spec["compute"])

    @property
    def label(self) -> str:
        """The training's name in messages."""
        return f"{self.spec['stage']} {self.spec['run']}"

    @property
    def state(self) -> Path:
        """The folder of the training's state: another one for other data, models or parent weights."""
        return self.manifest.parent / digest({"run": self.spec["run"], **self.digests}, 10)


def complete(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The specification with every default stated, as it is recorded beside the weights."""
    sections: dict[str, type[StrictModel]] = {
        "recipe": StageSpec,
        "compute": ComputeSpec,
        "model": ModelSection,
    }
    stated = {key: kind.model_validate(spec[key]).model_dump(mode="json") for key, kind in sections.items()}
    return {**spec, **stated}


def prepare(
    spec: Mapping[str, Any],
    mixture: Path,
    models: Sequence[Path],
    parent: Path | None,
    manifest: Path,
    survey: Path | None = None,
) -> Job:
    """Reads the manifests of everything that the training needs."""
    data = read_json(mixture)
    roles = {}
    for path in models:
        content = read_json(path)
        roles[content["role"]] = (path.parent / content["folder"], content["digest"])
    missing = {"llm", "vision_tower"} - roles.keys()
    if missing:
        raise UserError(
            f"--models: no manifest of role {', '.join(sorted(missing))}; give the LLM's and the vision"
            " tower's"
        )
    digests = {"mixture": data["digest"], **{role: value for role, (_, value) in roles.items()}}
    projector, tower = None, roles["vision_tower"][0]
    if parent is not None:
        content = read_json(parent)
        projector = parent.parent / content["folder"] / str(STAGES[spec["stage"]].takes)
        digests["parent"] = content["digest"]
        if f"{TOWER}/config.json" in content["files"]:
            tower = parent.parent / content["folder"] / TOWER
    lengths = None if survey is None else token_lengths(spec, survey, digests)
    inputs = Inputs(mixture.parent / "samples.json", roles["llm"][0], tower, projector, lengths)
    return Job(complete(spec), inputs, digests, manifest)


def token_lengths(spec: Mapping[str, Any], survey: Path, digests: Mapping[str, str]) -> Path | None:
    """The survey's table for this training; None where it is of other data, or counts images otherwise."""
    found = read_json(survey)
    if any(found["inputs"][name] != digests[name] for name in found["inputs"]):
        return None
    model = ModelSection.model_validate(spec["model"])
    mine = image_layout(model, Interventions.from_mapping(spec["interventions"]))
    names = [layout["file"] for layout in found["layouts"] if mine in layout["of"]]
    return survey.parent / names[0] if names else None


def why_in_vain(job: Job) -> str | None:
    """Why an attempt would be refused before anything heavy: an end, a verdict that stands, or too many
    failures without progress. None where it may do better, and where it can't be said.
    """
    try:
        verdicts.refuse_what_is_ended(job.manifest.parent, job.label)
        found = verdicts.read_verdict(job.state)
        if found:
            cause = verdicts.Cause.of(job.spec)
            told = verdicts.Cause(found["settings"], found["code"]) == cause
            return verdicts.explain(job.state, job.label, job.spec, found) if told else None
        owner = job.state / OWNER
        if reason := why_left_alone(owner):
            return f"{job.label}: {reason}"
        if not owner.is_file() or alive(read_json(owner)) is False:
            refuse_if_stuck(job, attempts.read_attempts(job.state))
    except UserError as error:
        return str(error)
    except (OSError, KeyError):
        return None
    return None


def refuse_if_stuck(job: Job, history: list[dict[str, Any]]) -> None:
    """Raises UserError when the last attempts of these settings and this code came no further."""
    attempts.refuse_if_stuck(
        job.state,
        history,
        job.compute.max_stuck_attempts,
        verdicts.cause_digest(job.spec),
        verdicts.try_again(job.spec),
    )


def finished_result(state: Path) -> dict[str, Any] | None:
    """The result of a training that has ended well and whose files are all there."""
    path = state / RESULT
    if not path.is_file():
        return None
    result = read_json(path)
    if result.get("status") != "finished":
        return None
    sizes = result.get("bytes", {})
    for name in result["files"]:
        file = state / name
        if not file.is_file() or (name in sizes and file.stat().st_size != sizes[name]):
            print(f"{file}: missing or changed since the training finished; it is made again", flush=True)
            return None
    return dict(result)


def conclude(job: Job, result: Mapping[str, Any]) -> None:
    """What follows a finished training; done again, it changes nothing, so a kill in between does no harm."""
    state = job.state
    if not (state / "provenance.json").is_file():
        command = read_json(state / "spec.json")["command"]
        write_json(state / "provenance.json", provenance(job.spec, job.digests, command, result))
    if not job.spec["recipe"].get("keep_states"):
        drop_states(state)
    publish(job, result)


def publish(job: Job, result: Mapping[str, Any]) -> None:
    """Writes the manifest: the same bytes for the same training, whatever happened on the way."""
    content = {
        "stage": job.spec["stage"],
        "run": job.spec["run"],
        "folder": job.state.name,
        "digest": digest(result["files"]),
        "files": result["files"],
        "step": result["step"],
        "metrics": result["metrics"],
        "inputs": dict(job.digests),
        "interventions": job.spec["interventions"],
        **({"skipped": result["skipped"]} if "skipped" in result else {}),
    }
    write_json(job.manifest, content)


def launch(job: Job) -> None:
    """Trains until the result is there, or raises UserError that says why not and where the log is."""
    state = job.state
    state.mkdir(parents=True, exist_ok=True)
    owner = Ownership(state, max(PATIENCE_S, job.compute.save_before_end_s))
    result = finished_result(state)
    if result is None:
        verdicts.refuse_what_is_ended(job.manifest.parent, job.label)
        verdicts.refuse_to_repeat(state, job.label, job.spec)
        owner.claim()
        try:
            result = finished_result(state) or attempt(job, owner)
        finally:
            owner.release()
    conclude(job, result)
    print(f"{job.label}: finished at step {result['step']}, {state}", flush=True)


def attempt(job: Job, owner: Ownership) -> dict[str, Any]:
    """One attempt: checks, starts, waits, judges by the result file."""
    state = job.state
    history = attempts.read_attempts(state)
    with attempts.recorded_refusal(state):
        command, nodes = admit(job, history)
    (state / RESULT).unlink(missing_ok=True)  # an older attempt's "interrupted" says nothing about this one
    row = attempts.begin(state, history, cause=verdicts.cause_digest(job.spec))
    trackers = tracking_environment(job.spec, state, [*history, row][0]["started"])
    environment = training_environment({**trackers, **os.environ}, job.compute)
    log = state / row["log"]
    print(f"{job.label}: attempt {row['attempt']} from step {row['from_step']}; log: {log}", flush=True)
    with Training(command, environment, log, job.label, job.compute.processes > 1, nodes.job) as training:
        owner.record_trainer(training.pid)
        return judge(job, row, training.wait(), log)


def admit(job: Job, history: list[dict[str, Any]]) -> tuple[list[str], Nodes]:
    """The command and the nodes of the next attempt. Raises UserError when a check before the start fails."""
    state, compute, inputs = job.state, job.compute, job.inputs
    nodes = slurm.job_nodes(slurm.job_id(), compute.nodes) if compute.nodes > 1 else Nodes()
    command = training_command(training_flags(job.spec, inputs, state), compute, nodes)
    # before the checks: from then on the training is seen by `status`, also when it is refused
    write_json(state / "spec.json", {"spec": job.spec, "inputs": job.digests, "command": command})
    refuse_if_stuck(job, history)
    paths = [inputs.samples, inputs.llm, inputs.vision_tower, *filter(None, [inputs.projector])]
    check_all(job.spec, compute, nodes, paths, state)
    return command, nodes


def judge(job: Job, row: Mapping[str, Any], status: int, log: Path) -> dict[str, Any]:
    """What the attempt came to. torchrun's exit status does not say it, the files do."""
    state = job.state
    result = finished_result(state)
    if result is not None:
        attempts.end(state, row, "finished")
        return result
    said = read_json(state / RESULT) if (state / RESULT).is_file() else {}
    if said.get("status") == "interrupted":
        attempts.end(state, row, "interrupted")
        print(
            f"{job.spec['run']}: interrupted, saved at step {said['step']}; the next attempt continues",
            flush=True,
        )
        raise SystemExit(INTERRUPTED)
    if said.get("status") == verdicts.STATUS:
        attempts.end(state, row, verdicts.STATUS)
        verdicts.pronounce(state, job.spec, said["reason"], row["log"])
        raise UserError(verdicts.explain(state, job.label, job.spec, verdicts.read_verdict(state)))
    attempts.end(state, row, f"failed ({status})")
    raise UserError(
        f"{job.label}: the training ended with status {status} after step "
        f"{attempts.saved_step(state)} was saved; its log: {log}"
    )


def drop_states(state: Path) -> None:
    """Deletes the saved states of a finished training, markers first: a half-deleted one must not look
    complete.
    """
    for folder in sorted(state.glob("checkpoint-*")):
        (folder / "complete.json").unlink(missing_ok=True)
        shutil.rmtree(folder)


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module's docs."""
    texts = {"spec": "the training, as JSON (what `Plan.training_spec` gives)"}
    paths = {"mixture": "the mixture's manifest", "manifest": "written when the training is finished"}
    parser = command_line("launch", __doc__, texts, paths)
    parser.add_argument(
        "--models", required=True, nargs=2, type=Path, help="the manifests of the LLM and of the vision tower"
    )
    parser.add_argument(
        "--parent", nargs="?", type=Path, help="the manifest of the run that the stage begins with"
    )
    parser.add_argument("--survey", type=Path, help="the manifest of the mixture's survey")
    options = parser.parse_args(argv)
    spec = json.loads(options.spec)
    launch(prepare(spec, options.mixture, options.models, options.parent, options.manifest, options.survey))


if __name__ == "__main__":
    main()
