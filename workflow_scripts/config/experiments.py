"""Experiments: a name, intervention flags, and what differs from the common model and stages."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, Field, create_model

from llava_ext.model.interventions import DEFAULTS, ROLES, Interventions, description
from workflow_scripts.config.base import StrictModel
from workflow_scripts.config.models import ModelSection
from workflow_scripts.config.stages import StageOverrides, StageSpec, partial_model
from workflow_scripts.config.types import Name
from workflow_scripts.stages import STAGES


def _from_interventions(doc: str) -> type[StrictModel]:
    """The strict model with the fields, defaults and docs of ``Interventions``: the flags are stated once."""
    hints = typing.get_type_hints(Interventions)
    fields: dict[str, Any] = {}
    for name, role in ROLES.items():
        # Only shown: the check is with the others, in Interventions.problems.
        names: dict[str, Any] | None = {"enum": list(role.allowed)} if role.allowed is not None else None
        field = Field(DEFAULTS[name], description=description(name), json_schema_extra=names)
        fields[name] = (hints[name], field)
    return create_model("InterventionsSpec", __base__=StrictModel, __doc__=doc, **fields)


InterventionsSpec = _from_interventions(
    "The intervention flags; all are off by default, which is vanilla LLaVA."
)
ModelOverrides = partial_model(
    ModelSection, "ModelOverrides", "What an experiment changes about the model; all fields are optional."
)


class _Experiment(StrictModel):
    """One experiment: everything that is left out is as in the common sections."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    description: str | None = None
    """One line for the report."""
    interventions: InterventionsSpec = Field(default_factory=InterventionsSpec)  # type: ignore[valid-type]
    """The flags, in both stages."""
    model: ModelOverrides = Field(default_factory=ModelOverrides)  # type: ignore[valid-type]
    """Other models or another projector."""
    tasks: tuple[Name, ...] | None = None
    """Which of the evaluation's tasks it is asked; left out, all."""


ExperimentSpec = create_model(
    "ExperimentSpec",
    __base__=_Experiment,
    __doc__=_Experiment.__doc__,
    **{
        name: (
            StageOverrides,
            Field(default_factory=StageOverrides, description=f"Changes of `stages.{name}`."),
        )
        for name in STAGES
    },  # type: ignore[call-overload]
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment with everything filled in."""

    name: str
    description: str
    interventions: Interventions
    model: ModelSection
    stages: Mapping[str, StageSpec]
    tasks: tuple[str, ...] | None = None

    def stage(self, name: str) -> StageSpec:
        """The stage called ``name``."""
        return self.stages[name]

    @property
    def flags(self) -> dict[str, Any]:
        """The interventions that differ from vanilla, as JSON values."""
        return changed_fields(self.interventions)


def changed_fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, as JSON values."""
    plain = type(value)()
    names = [field.name for field in dataclasses.fields(value)]
    found = {name: getattr(value, name) for name in names if getattr(value, name) != getattr(plain, name)}
    return {name: list(item) if isinstance(item, tuple) else item for name, item in found.items()}


def merged(base: StrictModel, overrides: StrictModel) -> dict[str, Any]:
    """The fields that ``base`` states, replaced by those that ``overrides`` states."""
    stated = {key: getattr(overrides, key) for key in overrides.model_fields_set}
    kept = {key: getattr(base, key) for key in base.model_fields_set}
    if stated.get("max_steps") is not None and "epochs" not in stated:
        kept.pop("epochs", None)
    if stated.get("epochs") is not None and "max_steps" not in stated:
        kept.pop("max_steps", None)
    return {**kept, **stated}
