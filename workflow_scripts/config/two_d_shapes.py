"""A drawn benchmark of spatial questions, in the form of the one that the paper published."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workflow_scripts.config.sources import Source


class TwoDShapesSource(Source):
    """Pictures of 2 to 6 coloured shapes at random places, six questions each: 2DS of arXiv 2503.17349, drawn
    here.

    Each picture is asked about colour, shape, and both together; each once by place (`absolute`) and once by
    the place of one shape to another (`relative`). Equal specs give equal bytes.
    """

    kind: Literal["two_d_shapes"] = "two_d_shapes"
    pictures: int = Field(default=500, ge=1, le=100_000)
    """Number of pictures; six times as many questions."""
    archive: Literal["zip", "tar", "folder"] = "zip"
    """What the pictures are packed in."""
    seed: int = 0
    """Other seeds give other pictures."""
    image_size: int = Field(default=336, ge=56, le=1024)
    """Side of the pictures, in pixels."""
