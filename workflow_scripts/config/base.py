"""What every part of the configuration shares: strict models and readable errors.

Nothing heavy may be imported here: the Snakefile loads this package at parse time.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """A configuration section: unknown keys are errors, values are frozen after validation.

    Field docs are written as attribute docstrings; they become the JSON schema's descriptions and the
    reference page. Cross-field checks are ``model_validator`` methods that raise ``ValueError`` with a
    message that names the key, the value, what is allowed and the fix.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
    )
