"""Types that several sections share: numbers that are no booleans, names that can be folder names."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


def _no_bool(value: Any) -> Any:
    """YAML's ``yes`` is ``true``, which Python would take for the number 1."""
    if isinstance(value, bool):
        raise ValueError("a number is needed here, not true or false")
    return value


Count = Annotated[int, Field(ge=0), BeforeValidator(_no_bool)]
Positive = Annotated[int, Field(gt=0), BeforeValidator(_no_bool)]
Seed = Annotated[int, Field(ge=0, lt=2**32), BeforeValidator(_no_bool)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_no_bool)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_no_bool)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(_no_bool)]
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=80)]
