"""From a dictionary to a checked configuration, or one message with everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llava_ext.model.interventions import Interventions
from workflow_scripts.config.checks import CHECKS
from workflow_scripts.config.experiments import Adopted, Experiment, merged
from workflow_scripts.config.models import ModelSection
from workflow_scripts.config.problems import Problem, find_problems
from workflow_scripts.config.schema import Config
from workflow_scripts.config.stages import StageSpec
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.io import UserError
from workflow_scripts.secrets import redact
from workflow_scripts.stages import STAGES

NAMED_SECTIONS = ("sources", "mixtures", "models", "compute", "experiments")


class Loaded:
    """A configuration that passed every check."""

    def __init__(self, config: Config, experiments: dict[str, Experiment], warnings: list[str]) -> None:
        self.config = config
        self.experiments = experiments
        self.warnings = warnings

    @cached_property
    def names(self) -> list[str]:
        """The names of the experiments that are trained, in the order of the file."""
        return list(self.experiments)

    @cached_property
    def adopted(self) -> dict[str, Adopted]:
        """The experiments whose checkpoints are not trained here."""
        names = [name for name, spec in self.config.experiments.items() if _checkpoint_of(spec) is not None]
        return {name: adopt(self.config, name) for name in names}


def load_config(raw: Mapping[str, Any], files: Sequence[str | Path] = ()) -> Loaded:
    """Validates ``raw`` (what Snakemake made of ``files``) with all of its experiments.

    Raises :class:`UserError` with one line for each problem.
    """
    label = ", ".join(str(file) for file in files) or "the configuration"
    raw = extended(raw, files)
    problems: list[Problem] = []
    experiments: dict[str, Experiment] = {}
    try:
        config = Config.model_validate(dict(raw))
    except ValidationError as error:
        problems = find_problems(Config, dict(raw), error)
    else:
        experiments, problems = _resolve_all(config)
        for check in CHECKS:
            problems += check(config, list(experiments.values()))
    if problems:
        lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, start=1))
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(redact(f"{label}: {count}\n{lines}\nEvery key is explained in docs/config.md."))
    return Loaded(config, experiments, _warnings(experiments))


def extended(raw: Mapping[str, Any], files: Sequence[str | Path] = ()) -> dict[str, Any]:
    """``raw`` merged over the file that its `extends` names, and over what that one extends.

    Of several files, which may be fragments, later ones are merged into earlier ones. An entry of a section
    of names (an experiment, a source, ...) that is null here is taken away. The path is relative to the file
    that says it; where that is not known (a module, `--config`), to the working folder.
    """
    return _extended(dict(raw), [*(Path(file).parent for file in files), Path()], ())


def _extended(content: dict[str, Any], places: Sequence[Path], seen: tuple[Path, ...]) -> dict[str, Any]:
    """``seen`` are the files that led here."""
    named = content.pop("extends", None)
    if named is None:
        return content
    contents = []
    for name in named if isinstance(named, list) else [named]:
        base = _find_base(name, places)
        if base in seen:
            raise UserError(
                f"{base}: extends itself, by {', '.join(map(str, seen))}; take one `extends` away"
            )
        contents.append(_extended(read_yaml(base), [base.parent], (*seen, base)))
    return _without_nulls(merged_contents([*contents, content]))


def _without_nulls(content: dict[str, Any]) -> dict[str, Any]:
    """The sections whose entries have names of their own, without those that were set to null."""
    kept = dict(content)
    for section in NAMED_SECTIONS:
        if isinstance(kept.get(section), Mapping):
            kept[section] = {name: entry for name, entry in kept[section].items() if entry is not None}
    return kept


def _find_base(name: Any, places: Sequence[Path]) -> Path:
    """The file that `extends` names."""
    if not isinstance(name, str):
        raise UserError(f"extends: found {name!r}; allowed is the path of a configuration file, or a list")
    found = [(place / name).resolve() for place in places]
    for path in found:
        if path.is_file():
            return path
    raise UserError(f"extends: {name}: no such file; looked for {', '.join(map(str, dict.fromkeys(found)))}")


def merged_contents(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Later contents merged into earlier ones, as Snakemake does with several files."""
    first, *others = contents
    if others:
        from snakemake.utils import update_config  # takes half a second to import

        for content in others:
            update_config(first, content)
    return first


def load_files(files: Sequence[Path]) -> Loaded:
    """Reads and validates YAML files; later ones are merged into earlier ones, as Snakemake does."""
    return load_config(merged_contents([read_yaml(path) for path in files]), files)


def _resolve_all(config: Config) -> tuple[dict[str, Experiment], list[Problem]]:
    experiments, problems = {}, []
    for name, spec in config.experiments.items():
        if _checkpoint_of(spec) is not None:
            continue
        try:
            experiments[name] = resolve(config, name)
        except _OverrideError as error:
            problems += error.problems
    return experiments, problems


class _OverrideError(Exception):
    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("invalid override")
        self.problems = problems


def _checkpoint_of(spec: Any) -> str | None:
    """The model that an experiment is, where it is not trained here."""
    found: str | None = spec.checkpoint
    return found


def adopt(config: Config, name: str) -> Adopted:
    """The experiment called ``name``, which is not trained here."""
    spec: Any = config.experiments[name]
    layout = getattr(config.models[spec.checkpoint], "layout", "hf")
    tower = spec.model.vision_tower or config.model.vision_tower
    return Adopted(
        name, spec.description or "", spec.checkpoint, tower if layout == "llava" else "", spec.tasks
    )


def resolve(config: Config, name: str) -> Experiment:
    """The experiment called ``name``, with the common sections filled in."""
    spec: Any = config.experiments[name]
    parts: dict[str, Any] = {}
    problems: list[Problem] = []
    bases: dict[str, Any] = {
        "model": config.model,
        **{name: getattr(config.stages, name) for name in STAGES},
    }
    for part, base in bases.items():
        model = ModelSection if part == "model" else StageSpec
        values = merged(base, getattr(spec, part))
        try:
            parts[part] = model.model_validate(values)
        except ValidationError as error:
            problems += find_problems(model, values, error, f"experiments.{name}.{part}")
    if problems:
        raise _OverrideError(problems)
    flags = {key: getattr(spec.interventions, key) for key in spec.interventions.model_fields_set}
    model = parts.pop("model")
    return Experiment(name, spec.description or "", Interventions(**flags), model, parts, spec.tasks)


def _warnings(experiments: dict[str, Experiment]) -> list[str]:
    found, first = [], dict[str, str]()
    for name, item in experiments.items():
        same = repr((item.interventions, item.model, item.stages))
        if same in first:
            found.append(f"experiments {first[same]} and {name} are identical: they share one training")
        first.setdefault(same, name)
    return found
