"""The kinds of source, the only list of them: what a section `sources` may be, and how each is made.

A new kind is a section (a subclass of :class:`Source`), a function that makes it, and an entry. What is heavy
is imported when a source is made, not when a configuration is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import Field

from workflow_scripts.acquire.hub_cache import cached_in_hub
from workflow_scripts.config.shapes import ShapesSource
from workflow_scripts.config.sources import HubFile, HubSource, PathSource, Source, UrlSource
from workflow_scripts.config.two_d_shapes import TwoDShapesSource


def _fetch_hub(spec: HubSource, folder: Path) -> dict[str, Any]:
    from workflow_scripts.acquire.remote_files import fetch_source, hub_getter

    return fetch_source(spec, folder, hub_getter)


def _fetch_urls(spec: UrlSource, folder: Path) -> dict[str, Any]:
    from workflow_scripts.acquire.remote_files import fetch_source, url_getter

    return fetch_source(spec, folder, url_getter)


def _describe(spec: PathSource, folder: Path) -> dict[str, Any]:
    from workflow_scripts.acquire.local_files import describe_local

    return describe_local(spec, folder)


def _draw(spec: ShapesSource, folder: Path) -> dict[str, Any]:
    from workflow_scripts.acquire.drawn_files import draw_source

    return draw_source(spec, folder)


def _draw_two_d_shapes(spec: TwoDShapesSource, folder: Path) -> dict[str, Any]:
    from workflow_scripts.evaluate.two_d_shapes import generate

    return generate(spec, folder)


def _in_hub_cache(spec: HubSource, file: HubFile) -> bool:
    return cached_in_hub(spec.repo, spec.repo_type, spec.revision, file.path)


@dataclass(frozen=True)
class SourceKind:
    """One kind of source."""

    spec: type[Source]
    """Its section, whose `kind` has the kind's name as the only value. The plan counts the sizes of what
    it lists as ``remote()``; what it lists as ``own()`` has to exist.
    """
    make: Callable[[Any, Path], dict[str, Any]]
    """From the section and the source's folder to `images`, `annotations` and `files` of the manifest.
    Each file has a `sha256` or an `identity`, from which the source's digest is made.
    """
    cached: Callable[[Any, Any], bool] | None = None
    """Whether a remote file lies in a cache of this machine, so that it is not fetched again."""

    @property
    def name(self) -> str:
        """The value of `kind`."""
        return str(self.spec.model_fields["kind"].default)


KINDS = {
    kind.name: kind
    for kind in (
        SourceKind(HubSource, _fetch_hub, _in_hub_cache),
        SourceKind(UrlSource, _fetch_urls),
        SourceKind(PathSource, _describe),
        SourceKind(ShapesSource, _draw),
        SourceKind(TwoDShapesSource, _draw_two_d_shapes),
    )
}

if TYPE_CHECKING:
    SourceSpec: TypeAlias = Source
else:
    SourceSpec = Annotated[reduce(or_, (kind.spec for kind in KINDS.values())), Field(discriminator="kind")]
