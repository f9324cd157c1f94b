"""What a site wants of `snakemake --profile slurm`, from a file outside the clone.

The file is named by $LLAVA_SLURM_SITE, or is `llava-spatial/slurm.yaml` in the user's configuration folder
($XDG_CONFIG_HOME, else ~/.config). It has the keys of the block "your site" of slurm/config.yaml, and is
merged over that file, resource by resource, while Snakemake reads the profile.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from workflow_scripts.config.problems import known, suggestion
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.io import UserError
from workflow_scripts.plan.resources import STEP_JOBS
from workflow_scripts.stages import STAGES

VARIABLE = "LLAVA_SLURM_SITE"
# What people write for what the Slurm plugin reads; the plugin passes over the left ones without a word.
MISNAMED = {
    "partition": "slurm_partition",
    "account": "slurm_account",
    "slurm_qos": "qos",
    "slurm_constraint": "constraint",
    "time": "runtime",
}
LIGHT = ("acquire", "prepare_model", "checkpoint", "report", "score", "evaluation", "compare", "diagnostics")
RULES = (*STAGES, *STEP_JOBS, "predict_shard", *LIGHT)
RESOURCES = (
    *("slurm_partition", "slurm_account", "qos", "constraint", "cluster", "clusters", "slurm_extra"),
    *("mem_mb", "mem", "mem_mb_per_cpu", "runtime", "disk_mb", "disk", "tmpdir", "gres", "gpu", "gpu_model"),
    *(
        "nodes",
        "tasks",
        "tasks_per_gpu",
        "tasks_per_node",
        "cpus_per_task",
        "cpus_per_gpu",
        "mpi",
        "exclusive",
    ),
)
KEYS = (
    *("default-resources", "set-resources", "set-threads", "config"),
    *("software-deployment-method", "apptainer-args", "apptainer-prefix", "conda-prefix"),
    *("jobs", "local-cores", "latency-wait", "max-jobs-per-second", "max-status-checks-per-second"),
    *("slurm-status-command", "slurm-status-attempts", "slurm-init-seconds-before-status-checks"),
    *("slurm-logdir", "slurm-delete-logfiles-older-than", "slurm-keep-successful-logs", "slurm-requeue"),
    *("slurm-no-requeue", "slurm-jobname-prefix", "slurm-exclude-failed-nodes", "slurm-qos"),
    *("slurm-reservation", "slurm-efficiency-report", "slurm-pass-command-as-script"),
)
# What may stand in a section of names: for a mapping the allowed names of the next level.
SECTIONS: Mapping[str, Sequence[str]] = {
    "default-resources": RESOURCES,
    "set-resources": RULES,
    "set-threads": RULES,
    "config": ("setup", "python"),
}


def site_file() -> Path | None:
    """The site's file; None where there is none. Raises UserError for a variable that names no file."""
    if named := os.environ.get(VARIABLE):
        path = Path(named).expanduser()
        if not path.is_file():
            raise UserError(
                f"${VARIABLE}: found {named!r}, and there is no such file; unset it or correct it"
            )
        return path
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    path = home / "llava-spatial/slurm.yaml"
    return path if path.is_file() else None


def profile_files(profile: Path) -> list[Path]:
    """The profile and, where there is one, the site's file, which wins."""
    site = site_file()
    return [path for path in (profile, site) if path and path.is_file()]


def read_profile(profile: Path) -> dict[str, Any]:
    """A profile's content with the site's values; empty where there is no profile."""
    return _content(profile) | site_values(profile) if profile.is_file() else {}


def _content(profile: Path) -> dict[str, Any]:
    return (yaml.safe_load(profile.read_text(encoding="utf-8")) or {}) if profile.is_file() else {}


def site_values(profile: Path) -> dict[str, Any]:
    """The keys of the profile that the site's file has, merged."""
    site, own = site_file(), _content(profile)
    return {key: _merged(own.get(key), value) for key, value in (read_yaml(site) if site else {}).items()}


def for_snakemake(profile: Path) -> dict[str, Any]:
    """The same for the profile itself, which Snakemake reads before it knows our errors; what nothing reads
    ends it.
    """
    try:
        files = [(path, read_yaml(path)) for path in profile_files(profile)]
        for path, content in files:  # Snakemake itself knows the other keys of a profile
            for key in [key for key in content if path == profile and key not in SECTIONS]:
                del content[key]
        if wrong := [line for path, content in files for line in _strange(path, content)]:
            raise UserError("\n".join(wrong))
        return site_values(profile)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
        return above
    return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}


def _strange(path: Path, values: Mapping[str, Any]) -> Iterator[str]:
    """One line for each key that nothing reads."""
    yield from _unknown(path, [], values, KEYS)
    for section, names in SECTIONS.items():
        content = values.get(section)
        if content is None:
            continue
        if not isinstance(content, Mapping):
            yield f"{place([path], [section])}: found {content!r}; allowed: a section (key: value lines)"
            continue
        yield from _unknown(path, [section], content, names)
        for rule, resources in content.items() if section == "set-resources" else ():
            if not isinstance(resources, Mapping):
                yield f"{place([path], [section, rule])}: found {resources!r}; allowed: key: value lines"
                continue
            yield from _unknown(path, [section, rule], resources, RESOURCES)


def _unknown(
    path: Path, keys: Sequence[str], content: Mapping[str, Any], names: Sequence[str]
) -> Iterator[str]:
    for key, value in content.items():
        if key in names or str(key).startswith("?"):  # a template of Snakemake's
            continue
        where = place([path], [*keys, str(key)])
        if key in MISNAMED and names is RESOURCES:
            yield f"{where} does not reach Slurm; write `{MISNAMED[key]}: {value}` instead"
        else:
            fix = suggestion(key, names, "remove it")
            yield f"{where}: there is no such key here; keys: {known(names)}; {fix}"


# ---------------------------------------------------------------- where a key stands


def place(files: Sequence[Path], keys: Sequence[str]) -> str | None:
    """`file, line N: a.b.c` in the last file that has the keys."""
    for path in reversed(files):
        if line := line_of(path, keys):
            return f"{path}, line {line}: {'.'.join(keys)}"
    return None


def line_of(path: Path, keys: Sequence[str]) -> int | None:
    """The line, from 1, of a key in a YAML file; None where it is not there."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (OSError, yaml.YAMLError):
        return None
    line = None
    for key in keys:
        found = next((pair for pair in _pairs(node) if pair[0].value == key), None)
        if found is None:
            return None
        line, node = found[0].start_mark.line + 1, found[1]
    return line


def _pairs(node: yaml.Node | None) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """The keys and values of a section: its own, then those that it takes from elsewhere by `<<`."""
    if isinstance(node, yaml.SequenceNode):  # of `<<: [*a, *b]`
        for item in node.value:
            yield from _pairs(item)
    own = node.value if isinstance(node, yaml.MappingNode) else []
    yield from own
    for key, value in own:
        if key.value == "<<":
            yield from _pairs(value)
