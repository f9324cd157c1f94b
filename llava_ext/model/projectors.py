"""The register of projectors: LLaVA's names and the number of linear layers that each means.

Plain standard library; copied beside exported checkpoints, so it imports nothing of this package.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Projector:
    """One kind of projector: linear layers with an activation between them.

    Attributes:
        title: its name, as LLaVA writes it; ``N`` stands for a number.
        pattern: what such names match; a group in it is the number of layers.
        depth: the number of layers where the name says none.
    """

    title: str
    pattern: str
    depth: int = 1


PROJECTORS: tuple[Projector, ...] = (
    Projector(title="linear", pattern="linear"),
    Projector(title="mlpNx_gelu", pattern=r"mlp([1-9]\d*)x_gelu"),
)


def projector_depth(projector_type: str) -> int:
    """Number of linear layers of a projector: `linear` -> 1, `mlpNx_gelu` -> N.

    Raises:
        ValueError: for any other name.
    """
    for entry in PROJECTORS:
        match = re.fullmatch(entry.pattern, projector_type)
        if match:
            return int(match.group(1)) if match.groups() else entry.depth
    allowed = " and ".join(f"`{entry.title}`" for entry in PROJECTORS)
    raise ValueError(
        f"projector_type: found {projector_type!r}; allowed are {allowed}, for example `mlp2x_gelu`"
    )
