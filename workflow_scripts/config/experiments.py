"""Experiments: a name, intervention flags, and what differs from the common model and stages."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Self, TypeAlias

from pydantic import ConfigDict, Field, create_model, model_validator

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
    checkpoint: str | None = None
    """A finished checkpoint that is not trained here: the name of a model with `role: checkpoint`. It is
    asked the same tasks and compared like the others."""
    interventions: InterventionsSpec = Field(default_factory=InterventionsSpec)  # type: ignore[valid-type]
    """The flags, in both stages."""
    model: ModelOverrides = Field(default_factory=ModelOverrides)  # type: ignore[valid-type]
    """Other models or another projector."""
    tasks: tuple[Name, ...] | None = None
    """Which of the evaluation's tasks it is asked; left out, all."""

    @model_validator(mode="after")
    def _nothing_to_train(self) -> Self:
        """A checkpoint that is there takes no recipe."""
        model: StrictModel = self.model
        vain = sorted(self.model_fields_set - {"description", "checkpoint", "model", "tasks"})
        vain += [f"model.{key}" for key in sorted(model.model_fields_set - {"vision_tower"})]
        if self.checkpoint is not None and vain:
            raise ValueError(
                f"checkpoint: {self.checkpoint} is not trained here, so there is nothing for"
                f" {', '.join(vain)} to change; remove them, or remove checkpoint"
            )
        return self


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


@dataclasses.dataclass(frozen=True)
class Adopted:
    """An experiment whose checkpoint is not trained here.

    Attributes:
        checkpoint: the model that it is.
        tower: the vision tower that the original layout needs; empty for transformers' layout.
        tasks: which of the evaluation's tasks it is asked; None for all.
    """

    name: str
    description: str
    checkpoint: str
    tower: str = ""
    tasks: tuple[str, ...] | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """The models that it is made from."""
        return (self.checkpoint, self.tower) if self.tower else (self.checkpoint,)


Checkpoint: TypeAlias = Experiment | Adopted
"""What tasks are asked: an experiment's checkpoint, trained here or not."""


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
