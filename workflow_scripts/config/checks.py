"""The rules between the sections of a configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_ext.model.towers import TOWERS, known_towers
from workflow_scripts.config.checkpoints import layout_problem
from workflow_scripts.config.compute import AUTO
from workflow_scripts.config.experiments import Experiment
from workflow_scripts.config.problems import Problem, known, suggestion
from workflow_scripts.config.schema import Config
from workflow_scripts.config.stages import StageSpec
from workflow_scripts.stages import STAGES, Stage, last_stage


def _reference(key: str, name: str, section: str, names: Any) -> Iterator[Problem]:
    if name not in names:
        yield Problem(
            key,
            name,
            f"a name of section {section}: {known(names)}",
            suggestion(name, names, f"add it to {section}"),
        )


def check_mixtures(config: Config, experiments: list[Experiment]) -> Iterator[Problem]:
    """Mixtures name sources that exist."""
    for name, mixture in config.mixtures.items():
        for number, part in enumerate(mixture.parts):
            where = f"mixtures.{name}.parts[{number}]"
            yield from _reference(f"{where}.annotations", part.annotations, "sources", config.sources)
            for place, mapping in enumerate(part.images):
                yield from _reference(
                    f"{where}.images[{place}].source", mapping.source, "sources", config.sources
                )


def check_evaluation(config: Config, experiments: list[Experiment]) -> Iterator[Problem]:
    """Tasks name sources that exist, experiments tasks, and the baseline is an experiment."""
    spec = config.evaluation
    tasks = spec.tasks if spec else {}
    for name, task in tasks.items():
        yield from _reference(f"evaluation.tasks.{name}.source", task.source, "sources", config.sources)
    for place, chosen in enumerate((spec.default_tasks if spec else None) or ()):
        yield from _reference(f"evaluation.default_tasks[{place}]", chosen, "evaluation.tasks", tasks)
    if spec and spec.baseline is not None:
        yield from _reference("evaluation.baseline", spec.baseline, "experiments", config.experiments)
    for experiment, asked in config.experiments.items():
        for place, chosen in enumerate(asked.tasks or ()):
            yield from _reference(
                f"experiments.{experiment}.tasks[{place}]", chosen, "evaluation.tasks", tasks
            )


def check_diagnostics(config: Config, experiments: list[Experiment]) -> Iterator[Problem]:
    """Diagnostics have tasks, and those that they name exist."""
    spec, tasks = config.diagnostics, config.evaluation.tasks if config.evaluation else {}
    if spec is None:
        return
    if not tasks:
        yield Problem(
            "diagnostics",
            "a section without evaluation",
            "only with an evaluation, whose questions are shown",
            "add the section evaluation, or remove diagnostics",
        )
    for place, chosen in enumerate(spec.tasks or ()):
        yield from _reference(f"diagnostics.tasks[{place}]", chosen, "evaluation.tasks", tasks)


def check_files(config: Config, experiments: list[Experiment]) -> Iterator[Problem]:
    """Files and folders of this machine that the configuration names are there."""
    for name, source in config.sources.items():
        where = f"sources.{name}.local" if source.remote() else f"sources.{name}"
        for key, path in source.own().paths():
            if not Path(path).expanduser().exists():
                yield Problem(
                    f"{where}.{key}",
                    path,
                    "a file or folder that exists",
                    "correct the path, or mount the disk",
                )
    for name, compute in config.compute.items():
        file = compute.deepspeed_config
        if file is not None and not Path(file).expanduser().is_file():
            yield Problem(
                f"compute.{name}.deepspeed_config",
                file,
                "a file that exists",
                "correct the path or leave it out",
            )


def _check_role(config: Config, key: str, name: str, role: str) -> Iterator[Problem]:
    """A model of that name exists, and has the role."""
    yield from _reference(key, name, "models", config.models)
    if name in config.models and config.models[name].role != role:
        fitting = [other for other, model in config.models.items() if model.role == role]
        fix = f"its role is {config.models[name].role}"
        yield Problem(key, name, f"a model with role: {role}: {known(fitting)}", fix)


def check_models(config: Config, experiments: list[Experiment]) -> Iterator[Problem]:
    """Experiments name models that exist and have the right role; model folders exist."""
    seen: set[tuple[str, str]] = set()
    for experiment in experiments:
        spec: Any = config.experiments[experiment.name]
        overrides = spec.model.model_fields_set
        for role, name in (("llm", experiment.model.llm), ("vision_tower", experiment.model.vision_tower)):
            key = f"experiments.{experiment.name}.model.{role}" if role in overrides else f"model.{role}"
            if (key, name) in seen:
                continue
            seen.add((key, name))
            yield from _check_role(config, key, name, role)
    for name, model in config.models.items():
        if model.kind == "path" and not (Path(model.path).expanduser() / "config.json").is_file():
            yield Problem(
                f"models.{name}.path",
                model.path,
                "a model folder with a config.json",
                "correct the path, or use kind: hub",
            )
        elif model.kind == "path" and model.role == "vision_tower":
            kind = _tower_config(Path(model.path).expanduser()).get("model_type")
            if kind is not None and kind not in TOWERS:
                fix = "use one of these; to add a family, add an entry to llava_ext/model/towers.py"
                yield Problem(f"models.{name}.path", kind, f"a registered tower: {known_towers()}", fix)


def check_checkpoints(config: Config, experiments: list[Experiment]) -> Iterator[Problem]:
    """Checkpoints that are not trained here are models of that role, in the layout that they say; the
    original layout has its vision tower.
    """
    for name, spec in config.experiments.items():
        found: Any = spec
        if found.checkpoint is None:
            continue
        yield from _check_role(config, f"experiments.{name}.checkpoint", found.checkpoint, "checkpoint")
        own = "vision_tower" in found.model.model_fields_set
        key = f"experiments.{name}.model.vision_tower" if own else "model.vision_tower"
        tower = found.model.vision_tower if own else config.model.vision_tower
        if getattr(config.models.get(found.checkpoint), "layout", "hf") == "llava":
            yield from _check_role(config, key, tower, "vision_tower")
        elif own:
            allowed = f"nothing: {found.checkpoint}, with layout: hf, has its tower in it"
            yield Problem(
                key, tower, allowed, "leave it out, or set layout: llava where it is in that layout"
            )
    if not experiments:  # nobody else looks at the kind of job that all of them take
        kind = getattr(config.stages, last_stage()).compute
        yield from _reference(f"stages.{last_stage()}.compute", kind, "compute", config.compute)
    for name, item in config.models.items():
        if item.kind == "path" and item.role == "checkpoint":
            yield from _check_layout(f"models.{name}", Path(item.path).expanduser(), item.layout)


def _check_layout(where: str, folder: Path, layout: str) -> Iterator[Problem]:
    """A folder of yours is in the layout that the configuration says; nothing where it can't be read."""
    described = _json(folder / "config.json")
    if described and (problem := layout_problem(described, layout)):
        message, fix = problem
        yield Problem(f"{where}.path", described.get("model_type"), message, fix)


def check_stages(config: Config, experiments: list[Experiment]) -> Iterator[Problem]:
    """Stages name mixtures and jobs that exist, and their batches can be divided; each place is named
    once.
    """
    seen: set[str] = set()
    for experiment in experiments:
        spec: Any = config.experiments[experiment.name]
        for stage in STAGES.values():
            overridden = getattr(spec, stage.name).model_fields_set
            where = f"experiments.{experiment.name}.{stage.name}" if overridden else f"stages.{stage.name}"
            for problem in _check_stage(config, experiment.stage(stage.name), stage, where):
                if str(problem) not in seen:
                    seen.add(str(problem))
                    yield problem


def _check_stage(config: Config, stage: StageSpec, kind: Stage, where: str) -> Iterator[Problem]:
    yield from _reference(f"{where}.mixture", stage.mixture, "mixtures", config.mixtures)
    yield from _reference(f"{where}.compute", stage.compute, "compute", config.compute)
    if not kind.trains_llm and stage.lora is not None:
        others = " or ".join(item.name for item in STAGES.values() if item.trains_llm)
        yield Problem(
            f"{where}.lora", "a LoRA", f"nothing: {kind.name} does not train the LLM", f"move it to {others}"
        )
    if not kind.trains_llm and not stage.train_projector:
        message = f"true: {kind.name} trains only the projector"
        yield Problem(f"{where}.train_projector", False, message, "leave it out")
    if stage.compute not in config.compute:
        return
    compute = config.compute[stage.compute]
    size = 1 if compute.per_device_batch_size == AUTO else int(compute.per_device_batch_size)
    together = compute.processes * size
    if stage.global_batch_size % together:
        yield Problem(
            f"{where}.global_batch_size",
            stage.global_batch_size,
            f"a multiple of {together} = {compute.processes} process(es) x {size}"
            f" samples (compute.{stage.compute})",
            f"change compute.{stage.compute}.per_device_batch_size or its number of GPUs, not the global"
            " batch: it decides the result",
        )


def tower_facts(config: Config, name: str) -> dict[str, int | None]:
    """What is known about a tower before it is fetched: ``side`` of its patch grid and number of
    ``layers``.
    """
    model = config.models.get(name)
    size, patch = getattr(model, "image_size", None), getattr(model, "patch_size", None)
    layers = getattr(model, "layers", None)
    if model is not None and model.kind == "path" and not (size and patch and layers):
        folder = Path(model.path).expanduser()
        found = _tower_config(folder)
        if found.get("model_type") in TOWERS and TOWERS[found["model_type"]].any_size:
            size = size or _crop_side(folder)
        size, patch = size or found.get("image_size"), patch or found.get("patch_size")
        layers = layers or found.get("num_hidden_layers")
    return {"side": size // patch if size and patch else None, "layers": layers}


def _tower_config(folder: Path) -> dict[str, Any]:
    found = _json(folder / "config.json")
    return dict(found.get("vision_config", found))


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _crop_side(folder: Path) -> int | None:
    """Side of the pictures that a tower's image processor cuts out, where its settings say it."""

    try:
        crop = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))["crop_size"]
        return int(crop["height"] if isinstance(crop, dict) else crop)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_interventions(config: Config, experiments: list[Experiment]) -> Iterator[Problem]:
    """The flags agree with each other, with the tower's grid and with its layers."""
    for experiment in experiments:
        where = f"experiments.{experiment.name}.interventions"
        facts = tower_facts(config, experiment.model.vision_tower)
        for line in experiment.interventions.problems(facts["side"], facts["layers"]):
            key, _, rest = line.partition(": ")
            message, _, fix = rest.rpartition("; ")
            found = getattr(experiment.interventions, key, experiment.flags)
            yield Problem(f"{where}.{key}", found, message or rest, fix if message else "change the flags")
        size = experiment.interventions.final_spatial_size
        if size is not None and facts["side"] and size == facts["side"] ** 2:
            fix = "choose fewer, or leave both out"
            message = (
                f"fewer than the {size} tokens of the tower's grid: as many as there are is no compression"
            )
            yield Problem(f"{where}.final_spatial_size", size, message, fix)
        layer, layers = experiment.model.vision_feature_layer, facts["layers"]
        if layers is not None and not -layers - 1 <= layer <= layers:
            yield Problem(
                "model.vision_feature_layer",
                layer,
                f"-{layers + 1} to {layers}: the tower has {layers} layers",
                "pick one of these",
            )


def check_kept_tokens(config: Config, experiments: list[Experiment]) -> Iterator[Problem]:
    """`cls_patch` has something to keep, where the tower's files are here; each place is named once."""
    seen: set[str] = set()
    for experiment in experiments:
        model = experiment.model
        found = _known_tower(config, model.vision_tower)
        entry = TOWERS.get(str(found.get("model_type")))
        if model.vision_feature_select != "cls_patch" or entry is None:
            continue
        spec: Any = config.experiments[experiment.name]
        own = {"vision_feature_select", "vision_tower"} & spec.model.model_fields_set
        where = f"experiments.{experiment.name}.model" if own else "model"
        if not entry.tokens_before(SimpleNamespace(**found)) and where not in seen:
            seen.add(where)
            yield Problem(
                f"{where}.vision_feature_select",
                model.vision_feature_select,
                f"patch: a {entry.title} tower ({model.vision_tower}) has no class token that could be kept",
                "set patch, or take another tower",
            )


def _known_tower(config: Config, name: str) -> dict[str, Any]:
    """A tower's `config.json`: of a folder of yours, or of a model that has been prepared; else empty."""
    model: Any = config.models.get(name)
    if model is not None and model.kind == "path":
        return _tower_config(Path(model.path).expanduser())
    prepared = Path("models") / name
    same = model is not None and _json(prepared / "manifest.json").get("repo") == getattr(model, "repo", "")
    return _tower_config(prepared / "model") if same else {}


def check_room(config: Config, experiments: list[Experiment]) -> Iterator[Problem]:
    """A picture and some text fit below `model_max_length`, where the tower's grid is known; each place is
    named once.
    """
    seen: set[str] = set()
    for experiment in experiments:
        needed = _least_tokens(config, experiment)
        for name in STAGES:
            length = experiment.stage(name).model_max_length
            if needed is None or length > needed:
                continue
            spec: Any = getattr(config.experiments[experiment.name], name)
            own = "model_max_length" in spec.model_fields_set
            problem = Problem(
                f"experiments.{experiment.name}.{name}.model_max_length"
                if own
                else f"stages.{name}.model_max_length",
                length,
                f"more than {needed}, the tokens of one picture in experiment {experiment.name}: they come"
                " first, and nothing would be left of the text",
                "raise it (LLaVA-1.5 has 2048), or use compression_after_projection",
            )
            if problem.key not in seen:
                seen.add(problem.key)
                yield problem


def _least_tokens(config: Config, experiment: Experiment) -> int | None:
    """Tokens that a picture takes at least; None where the tower's grid is not known or the flags are
    wrong.
    """
    facts, chosen = tower_facts(config, experiment.model.vision_tower), experiment.interventions
    if facts["side"] is None or chosen.problems(facts["side"], facts["layers"]):
        return None
    tokens = chosen.tokens_per_image(facts["side"])
    return tokens + tokens // chosen.sparsity if chosen.interleave else tokens


CHECKS: tuple[Callable[[Config, list[Experiment]], Iterator[Problem]], ...] = (
    check_mixtures,
    check_evaluation,
    check_diagnostics,
    check_files,
    check_models,
    check_checkpoints,
    check_stages,
    check_interventions,
    check_kept_tokens,
    check_room,
)
