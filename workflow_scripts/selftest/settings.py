"""What each kind of job asks Slurm for, and which line of which file says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow_scripts.plan.plan import Plan
from workflow_scripts.plan.resources import STEP_JOBS, StepJob, resources_of
from workflow_scripts.plan.scans import scan_job
from workflow_scripts.selftest.findings import Finding
from workflow_scripts.site import MISNAMED, place, profile_files, read_profile

# A resource of a training, and the keys of `compute` that say it, the first of them that is set.
COMPUTE_KEYS = {
    "threads": ("cpus",),
    "mem_mb": ("mem_mb",),
    "runtime": ("runtime_min",),
    "nodes": ("nodes",),
    "gres": ("gres", "gpus_per_node"),
}


@dataclass(frozen=True)
class Setting:
    """A value and where it is said: file, line and key, or which key to add."""

    value: Any
    where: str


@dataclass(frozen=True)
class Job:
    """A kind of job: who asks for it, and its resources (`threads` among them)."""

    name: str
    rule: str
    settings: Mapping[str, Setting]

    def value(self, key: str) -> Any:
        """What a resource is; None where it is not set."""
        return self.settings[key].value if key in self.settings else None


def misnamed(profile: Path) -> Iterator[Finding]:
    """Keys of the profile that look like a site's values and reach Slurm under another name only."""
    for keys, section in _sections(profile):
        for key in section:
            if key in MISNAMED:
                where = place(profile_files(profile), [*keys, key])
                text = f"{where} does not reach Slurm; write `{MISNAMED[key]}: {section[key]}` instead"
                yield Finding("profile", False, text)


def _sections(profile: Path) -> list[tuple[list[str], Mapping[str, Any]]]:
    """All sections of resources in a profile, under their keys."""
    content = read_profile(profile)
    found = [(["default-resources"], content.get("default-resources"))]
    found += [(["set-resources", rule], part) for rule, part in (content.get("set-resources") or {}).items()]
    return [(keys, section) for keys, section in found if isinstance(section, Mapping)]


def kinds_of_job(plan: Plan, configfiles: Sequence[Path], profile: Path) -> list[Job]:
    """Every kind of job that the configuration submits, each once: CPU steps, trainings, exports,
    evaluations.
    """
    scans = [_step("scan", {}, profile, scan_job(plan, name)) for name in plan.scanned()]
    jobs = [*scans, *(_step(rule, {}, profile) for rule in ("mixture", "survey"))]
    if plan.questions:
        jobs += [_step(rule, {}, profile) for rule in ("prepare_questions", "lmms_scores")]
    for run in plan.trainings():
        name = plan.experiment_of(run.stage, run.name).stage(run.stage).compute
        compute = plan.compute(run.stage, run.name)
        asked = {**resources_of(compute), "threads": compute.cpus}
        own = {key: _of_compute(name, key, value, configfiles) for key, value in asked.items()}
        jobs.append(_job(f"{run.stage} on compute.{name}", run.stage, own, profile))
    for stage in ("export", "predict", "diagnose"):
        for name in plan.names(stage):
            compute_name = plan.single_compute(stage, name)
            asked = plan.single_job(stage, name)
            own = {key: _of_compute(compute_name, key, value, configfiles) for key, value in asked.items()}
            jobs.append(_step(stage, own, profile))
    return list({(job.name, str(job.settings)): job for job in jobs}.values())


def _of_compute(name: str, key: str, value: Any, configfiles: Sequence[Path]) -> Setting:
    for field in COMPUTE_KEYS.get(key, ()):
        if where := place(configfiles, ["compute", name, field]):
            return Setting(value, where)
    field = COMPUTE_KEYS.get(key, (key,))[0]
    return Setting(value, f"{configfiles[-1]}: add compute.{name}.{field}")


def _step(rule: str, own: Mapping[str, Setting], profile: Path, asked: StepJob | None = None) -> Job:
    """A step that is no training: what all of its jobs ask for, and what the configuration adds."""
    asked = asked or STEP_JOBS[rule]
    where = f"{profile}: add set-resources.{rule}"
    common = {"threads": Setting(asked.threads, f"{profile}: add set-threads.{rule}")}
    common["runtime"] = Setting(asked.runtime, f"{where}.runtime")
    if asked.mem_mb is not None:
        common["mem_mb"] = Setting(asked.mem_mb, f"{where}.mem_mb")
    return _job(rule, rule, common | dict(own), profile)


def _job(name: str, rule: str, own: Mapping[str, Setting], profile: Path) -> Job:
    """The resources of a rule's jobs as Snakemake puts them together: defaults, the rule's own, the
    profile's.
    """
    content, sections = read_profile(profile), dict(_by_name(profile))
    found = {key: value for key, value in own.items() if value.value is not None}
    found = _from_profile(sections.get(""), ["default-resources"], profile) | found
    if threads := (content.get("set-threads") or {}).get(rule):
        found["threads"] = Setting(
            int(threads), place(profile_files(profile), ["set-threads", rule]) or str(profile)
        )
    found |= _from_profile(sections.get(rule), ["set-resources", rule], profile)
    return Job(name, rule, found)


def _by_name(profile: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for keys, section in _sections(profile):
        yield keys[1] if len(keys) > 1 else "", section


def _from_profile(
    section: Mapping[str, Any] | None, keys: Sequence[str], profile: Path
) -> dict[str, Setting]:
    return {
        "mem_mb" if key == "mem" else key: Setting(
            _evaluated(key, value), place(profile_files(profile), [*keys, key]) or str(profile)
        )
        for key, value in (section or {}).items()
    }


def _evaluated(key: str, raw: Any) -> Any:
    """A profile's value as the first attempt of a job gets it: `2h`, `4 GB`, `"400000 * attempt"`."""
    from snakemake.exceptions import WorkflowError
    from snakemake.resources import Resource

    try:
        value = Resource.parse_human_friendly(key, raw)
    except WorkflowError:
        value = raw
    if not isinstance(value, str) or value.isdigit():
        return int(value) if isinstance(value, str) else value
    return (
        Resource.from_cli_expression(key, value, with_threads_arg=False)
        .evaluate({}, input=[], attempt=1, rulename="", async_run=None)
        .value
    )
