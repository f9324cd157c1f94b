"""What every part of the configuration shares: strict models and readable errors.

Nothing heavy may be imported here: the Snakefile loads this package at parse time.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """A configuration section: unknown keys are errors, values are frozen after validation.

    Field docs are written as attribute docstrings; ``reference`` reads them from the source for the JSON
    schema and the reference page (pydantic would at every start of Snakemake, for half a second).
    Cross-field checks are ``model_validator`` methods that raise ``ValueError`` with a message that names
    the key, the value, what is allowed and the fix.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
    )

    documented_like: ClassVar[type[StrictModel] | None] = None
    """The class whose field docs hold here too."""
