"""REGISTER of poolings: how `compression_after_projection` makes few vision tokens of many.

The configuration reads the names when it is parsed, so torch is imported by the functions that need it. The
file is copied beside exported checkpoints and imports nothing else of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pooling:
    """One pooling.

    Attributes:
        name: the value of the field `pooling`.
        doc: what a new token is, for the reference page.
        pool: (tokens, side) -> tokens, from (images, g * g, hidden) to (images, side * side, hidden), row by
            row. The side divides g, except with `published_behaviour`, which takes `average` alone.
    """

    name: str
    doc: str
    pool: Callable[[Tensor, int], Tensor]


def average(tokens: Tensor, side: int) -> Tensor:
    """The mean of each window: (images, g * g, hidden) -> (images, side * side, hidden); windows overlap
    where g / side is broken.
    """
    from torch.nn.functional import adaptive_avg_pool2d

    images, count, hidden = tokens.shape
    grid = round(count**0.5)
    if grid % side == 0:  # whole windows: a mean, which is deterministic on every device
        step = grid // side
        return (
            tokens.view(images, side, step, side, step, hidden)
            .mean(dim=(2, 4))
            .reshape(images, side * side, hidden)
        )
    planes = tokens.transpose(1, 2).reshape(images, hidden, grid, grid)
    return adaptive_avg_pool2d(planes, side).flatten(2).transpose(1, 2)


DEFAULT_POOLING = "average"
POOLINGS = {
    entry.name: entry for entry in (Pooling(DEFAULT_POOLING, "the mean of a window of the grid", average),)
}
