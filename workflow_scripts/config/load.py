"""From a plain dictionary to a checked configuration, or one message with everything that is wrong with it."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from llava_ext.model.interventions import Interventions
from workflow_scripts.config.experiments import Experiment, merged
from workflow_scripts.config.models import ModelSection
from workflow_scripts.config.schema import CHECKS, Config, Problem, known, suggestion
from workflow_scripts.config.stages import StageSpec
from workflow_scripts.io import UserError
from workflow_scripts.stages import STAGES

# pydantic's word for what a value should be, in plain English.
EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "dict": "a section (key: value lines)",
    "model": "a section (key: value lines)",
    "tuple": "a list",
    "list": "a list",
}


class Loaded:
    """A configuration that passed every check."""

    def __init__(self, config: Config, experiments: dict[str, Experiment], warnings: list[str]) -> None:
        self.config = config
        self.experiments = experiments
        self.warnings = warnings

    @cached_property
    def names(self) -> list[str]:
        """The experiments' names, in the order of the file."""
        return list(self.experiments)


def load_config(raw: Mapping[str, Any], files: typing.Sequence[str | Path] = ()) -> Loaded:
    """Validates ``raw`` (what Snakemake made of ``files``) with all of its experiments.

    Raises :class:`UserError` with one line for each problem.
    """
    label = ", ".join(str(file) for file in files) or "the configuration"
    problems: list[Problem] = []
    experiments: dict[str, Experiment] = {}
    try:
        config = Config.model_validate(dict(raw))
    except ValidationError as error:
        problems = [problem for item in _own_errors(error) for problem in _problems(Config, dict(raw), item)]
    else:
        experiments, problems = _resolve_all(config)
        for check in CHECKS:
            problems += check(config, list(experiments.values()))
    if problems:
        lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, start=1))
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{label}: {count}\n{lines}\nEvery key is explained in docs/config.md.")
    return Loaded(config, experiments, _warnings(experiments))


def load_files(files: typing.Sequence[Path]) -> Loaded:
    """Reads and validates YAML files; later ones are merged into earlier ones, as Snakemake does."""
    merged_files: dict[str, Any] = {}
    for path in files:
        content = _read(path)
        if merged_files:
            from snakemake.utils import update_config  # takes half a second to import

            update_config(merged_files, content)
        else:
            merged_files = content
    return load_config(merged_files, files)


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: the file does not exist; give the path of a configuration file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: found {type(raw).__name__}; allowed: the sections of docs/config.md")
    return raw


def _resolve_all(config: Config) -> tuple[dict[str, Experiment], list[Problem]]:
    experiments, problems = {}, []
    for name in config.experiments:
        try:
            experiments[name] = resolve(config, name)
        except _OverrideError as error:
            problems += error.problems
    return experiments, problems


class _OverrideError(Exception):
    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("invalid override")
        self.problems = problems


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
            place = f"experiments.{name}.{part}"
            problems += [
                problem for item in _own_errors(error) for problem in _problems(model, values, item, place)
            ]
    if problems:
        raise _OverrideError(problems)
    flags = {key: getattr(spec.interventions, key) for key in spec.interventions.model_fields_set}
    return Experiment(name, spec.description or "", Interventions(**flags), parts.pop("model"), parts)


def _warnings(experiments: dict[str, Experiment]) -> list[str]:
    found, first = [], dict[str, str]()
    for name, item in experiments.items():
        same = repr((item.interventions, item.model, item.stages))
        if same in first:
            found.append(f"experiments {first[same]} and {name} are identical: they share one training")
        first.setdefault(same, name)
    return found


# ---------------------------------------------------------------- pydantic's errors, for people


def _own_errors(error: ValidationError) -> list[Any]:
    """The errors without those that only follow from another: a list is not too short because its items are wrong."""
    found = error.errors()
    return [
        item
        for item in found
        if item["type"] != "too_short"
        or not any(other is not item and other["loc"][: len(item["loc"])] == item["loc"] for other in found)
    ]


def _problems(model: type[BaseModel], raw: Any, error: Any, prefix: str = "") -> list[Problem]:
    """One of pydantic's errors as a :class:`Problem`; ``raw`` is what was validated."""
    location = list(error["loc"])
    path, parent = _written_path(raw, location)
    key = ".".join([prefix, *path] if prefix else path).replace(".[", "[") or "the file"
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        names = sorted(_keys_at(model, location[:-1]))
        word = str(location[-1])
        advice = suggestion(word, names, "remove it")
        listed = "" if "did you mean" in advice else f"; keys: {known(names)}"
        return [
            Problem(key, error["input"], f"found {word!r}, and there is no such key here{listed}", advice)
        ]
    if kind == "missing":
        return [Problem(key, None, "a value: the key is required", "add it")]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = context.get("expected_tags") or known(_tags_at(model, location))
        found = parent.get("kind") if isinstance(parent, dict) else None
        if isinstance(error["input"], dict):
            found = error["input"].get("kind")
        names = [tag.strip("' ") for tag in str(tags).split(",")]
        return [
            Problem(
                f"{key}.kind", found, f"one of {', '.join(names)}", suggestion(str(found), names, "set kind")
            )
        ]
    if kind == "value_error":
        text = str(context.get("error", error["msg"]))
        message, fix = _split_advice(text)
        if isinstance(error["input"], dict | list | tuple | BaseModel):
            message = f"found {message.removeprefix('found ')}"
        return [Problem(key, error["input"], message, fix)]
    allowed, fix = _allowed(error)
    return [Problem(key, error["input"], allowed, fix)]


def _split_advice(text: str) -> tuple[str, str]:
    """Our own messages end in `; what to do`."""
    message, _, advice = text.rpartition("; ")
    return (message, advice) if message else (text, "correct the value")


def _allowed(error: Any) -> tuple[str, str]:
    """What pydantic wanted, and what to do."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "literal_error":
        names = [name.strip("' ") for name in str(context["expected"]).replace(" or ", ", ").split(",")]
        return f"one of {', '.join(names)}", suggestion(str(error["input"]), names, "choose one of them")
    if kind == "string_pattern_mismatch":
        return f"a text of the form {context['pattern']}", "correct the spelling"
    limits = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}
    if kind in limits:
        value = context.get("gt", context.get("ge", context.get("lt", context.get("le"))))
        return f"a number {limits[kind]} {value}", "correct the number"
    stem = kind.split("_")[0]
    if stem in EXPECTED:
        return EXPECTED[stem], "correct the value"
    return str(error["msg"]), "correct the value"


def _written_path(raw: Any, location: list[Any]) -> tuple[list[str], Any]:
    """The keys as they stand in the file (pydantic adds the `kind` of a union), and the innermost section."""
    path: list[str] = []
    here: Any = raw
    parent: Any = raw
    for position, item in enumerate(location):
        last = position == len(location) - 1
        if isinstance(here, Mapping) and item in here:
            parent, here = here, here[item]
            path.append(str(item))
        elif isinstance(here, list | tuple) and isinstance(item, int) and item < len(here):
            parent, here = here, here[item]
            path.append(f"[{item}]")
        elif isinstance(here, BaseModel) and isinstance(item, str) and hasattr(here, item):
            parent, here = here, getattr(here, item)
            path.append(item)
        elif last and isinstance(here, Mapping) and item != "[key]" and here.get("kind") != item:
            path.append(str(item))
    return path, parent


def _keys_at(model: Any, location: list[Any]) -> set[str]:
    """The keys that the section at ``location`` may have."""
    found: set[str] = set()
    for candidate in _models_at([model], location):
        found |= set(candidate.model_fields)
    return found


def _tags_at(model: Any, location: list[Any]) -> list[str]:
    tags: list[str] = []
    for candidate in _models_at([model], location):
        field = candidate.model_fields.get("kind")
        if field is not None:
            tags += [str(value) for value in typing.get_args(field.annotation)]
    return tags


def _models_at(annotations: list[Any], location: list[Any]) -> list[type[BaseModel]]:
    """The models that ``location`` may mean, through dictionaries, lists and unions."""
    here = [model for annotation in annotations for model in _alternatives(annotation)]
    if not location:
        return [model for model in here if isinstance(model, type) and issubclass(model, BaseModel)]
    item, rest = location[0], location[1:]
    following: list[Any] = []
    for candidate in here:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            field, kind = candidate.model_fields.get(str(item)), candidate.model_fields.get("kind")
            if field is not None:
                following.append(field.annotation)
            elif kind is not None and item in typing.get_args(kind.annotation):
                following.append(candidate)
        else:
            following += [argument for argument in typing.get_args(candidate) if argument is not Ellipsis]
    return _models_at(following, rest)


def _alternatives(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [model for argument in typing.get_args(annotation) for model in _alternatives(argument)]
    return [annotation]
