"""What data there are (`sources`) and how they are put together (`mixtures`)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, model_validator

from workflow_scripts.config.base import StrictModel
from workflow_scripts.config.shapes import ShapesSource
from workflow_scripts.config.types import Count, Integer, Name, NonNegative, Positive, Share

Role = Literal["images", "annotations", "other"]
BadStatus = Literal["truncated", "suspect", "corrupt", "not_an_image", "empty", "too_large", "missing"]
BAD_STATUSES: tuple[BadStatus, ...] = (
    "truncated",
    "suspect",
    "corrupt",
    "not_an_image",
    "empty",
    "too_large",
    "missing",
)


def _lower_sha256(value: Any) -> Any:
    if value is None or (isinstance(value, str) and re.fullmatch(r"[0-9a-fA-F]{64}", value)):
        return value.lower() if value else value
    raise ValueError(f"{value!r} is no sha256: write the 64 hexadecimal digits in quotes, or leave it out")


def _http_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{value!r} is no URL that can be fetched: it must begin with http:// or https://")
    if parts.username or parts.password:
        raise ValueError("a URL with a password in it would end up in logs and manifests; use a .netrc file")
    return value


def _relative_name(value: str) -> str:
    parts = value.split("/")
    if value.startswith("/") or "\\" in value or any(p in ("", ".", "..") for p in parts):
        raise ValueError(f"{value!r} must be a plain path inside the source, with / and without '..'")
    return value


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Sha256 = Annotated[str | None, BeforeValidator(_lower_sha256)]
Url = Annotated[str, AfterValidator(_http_url)]
Urls = Annotated[tuple[Url, ...], BeforeValidator(_one_or_more), Field(min_length=1)]
RelativeName = Annotated[str, AfterValidator(_relative_name), Field(min_length=1)]
Paths = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]


class RemoteFile(StrictModel):
    """What is known of a file before it is fetched."""

    role: Role
    """`images` (an archive, at most one a source), `annotations` (LLaVA JSON or JSON lines) or `other`."""
    bytes: Positive | None = None
    """Size; a download of another size is refused before it begins."""
    about_gb: Annotated[float, Field(gt=0)] | None = None
    """Size for the plan where the exact one is not known."""
    sha256: Sha256 = None
    """Hash; verified while the file streams in."""
    trust: Literal["publisher", "first_use"] = "publisher"
    """`publisher`: another hash is an error. `first_use`: the hash was read from a copy that somebody uploaded
    again, so that another one is recorded with a warning."""


class HubFile(RemoteFile):
    """A file of a Hugging Face repository."""

    path: RelativeName
    """Path inside the repository."""
    mirrors: Annotated[tuple[Url, ...], BeforeValidator(_one_or_more)] = ()
    """URLs of the same file, tried in order when the hub does not give it."""

    @property
    def name(self) -> str:
        """The file's path below the source's folder."""
        return self.path


class UrlFile(RemoteFile):
    """A file on a web server."""

    url: Urls
    """Where it is; several URLs are mirrors, tried in order."""
    name: RelativeName = ""
    """Name on the disk; by default the last part of the first URL."""

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("name") and data.get("url"):
            first = data["url"] if isinstance(data["url"], str) else data["url"][0]
            name = unquote(urlsplit(str(first)).path).rsplit("/", 1)[-1]
            if not name:
                raise ValueError(f"url: {first!r} does not end in a file name; add `name:`")
            return {**data, "name": name}
        return data


class LocalFiles(StrictModel):
    """Files that are already on this machine, used where they lie instead of a download."""

    images: str | None = None
    """A zip, a tar or a folder."""
    annotations: Paths = ()
    """LLaVA JSON or JSON-lines files."""


class _Source(StrictModel):
    expected_images: Positive | None = None
    """Number of image files; the scan warns when it finds another number."""
    local: LocalFiles = LocalFiles()
    """Copies that you already have, used in place; a given part replaces the download of that part."""

    @model_validator(mode="after")
    def _one_store(self) -> Self:
        files = getattr(self, "files", ())
        names = [file.name for file in files]
        if sum(file.role == "images" for file in files) > 1:
            raise ValueError(
                "files: two files have role: images; an archive is a source of its own, so split them"
            )
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"files: two files are called {name!r}; give one another `name`")
        return self


class HubSource(_Source):
    """Files of a Hugging Face repository at a pinned revision."""

    kind: Literal["hub"] = "hub"
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    """`owner/name`."""
    repo_type: Literal["dataset", "model"] = "dataset"
    """What the repository is."""
    revision: Annotated[str, Field(min_length=1)]
    """Commit (full, or its first 7 digits or more) or tag. A branch can move: pin a commit."""
    files: Annotated[tuple[HubFile, ...], Field(min_length=1)]
    """The files to fetch."""
    connections_per_host: Annotated[Positive, Field(le=16)] = 2
    """Downloads at a time from one host."""


class UrlSource(_Source):
    """Files on web servers."""

    kind: Literal["url"] = "url"
    files: Annotated[tuple[UrlFile, ...], Field(min_length=1)]
    """The files to fetch."""
    connections_per_host: Annotated[Positive, Field(le=16)] = 2
    """Downloads at a time from one host; some hosts answer 503 to more than one."""


class PathSource(StrictModel):
    """Data that are on this machine already and are used where they lie: nothing is copied or changed."""

    kind: Literal["path"] = "path"
    images: str | None = None
    """A zip, a tar or a folder."""
    annotations: Paths = ()
    """LLaVA JSON or JSON-lines files."""
    sha256: dict[str, Sha256] = Field(default_factory=dict)
    """Hashes to verify, by file name; without one a big archive is identified by its size and its table of
    contents, which takes no time."""
    expected_images: Positive | None = None
    """Number of image files; the scan warns when it finds another number."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.images is None and not self.annotations:
            raise ValueError("a path source needs `images`, `annotations` or both")
        return self


SourceSpec = Annotated[HubSource | UrlSource | PathSource | ShapesSource, Field(discriminator="kind")]
source_spec: TypeAdapter[HubSource | UrlSource | PathSource | ShapesSource] = TypeAdapter(SourceSpec)


class Policy(StrictModel):
    """What happens to a record whose image is not in order. `keep` trains on what can be decoded, `drop` leaves
    the record out and says so in the mixture's report, `fail` stops before anything is trained."""

    truncated: Literal["keep", "drop", "fail"] = "keep"
    """The file ends early; `keep` fills the rest with gray, as LLaVA's LOAD_TRUNCATED_IMAGES does."""
    suspect: Literal["keep", "drop", "fail"] = "keep"
    """libjpeg found extra bytes: damage or harmless padding."""
    corrupt: Literal["keep", "drop", "fail"] = "drop"
    """The data are damaged, or their CRC is wrong."""
    not_an_image: Literal["drop", "fail"] = "drop"
    """Something else under an image's name."""
    empty: Literal["drop", "fail"] = "drop"
    """No bytes."""
    too_large: Literal["drop", "fail"] = "drop"
    """More pixels than the scan's limit."""
    missing: Literal["drop", "fail"] = "drop"
    """Not in the archive."""
    malformed: Literal["drop", "fail"] = "fail"
    """The record itself is wrong: no conversations, wrong types, a path that leaves the folder."""
    duplicate_ids: Literal["keep", "drop", "fail"] = "keep"
    """The same `id` again (LLaVA's own files have many); `drop` keeps the first."""
    max_dropped_share: Share = 0.01
    """More dropped records than this share of the part is an error."""


class ImageMapping(StrictModel):
    """Where the images are whose path in the annotations begins with `prefix`."""

    prefix: str = ""
    """Beginning of the path, whole folders: `coco/train2017` takes coco/train2017/1.jpg; empty takes everything.
    The longest matching prefix wins; the same prefix again is a fallback for images that are missing or bad."""
    source: Name
    """The source that has them."""
    root: str = "auto"
    """Folder inside the source that takes the prefix's place; `auto` finds it by comparing names."""
    any_suffix: bool = False
    """Also take the same name with another image suffix (1.gif for 1.jpg), as some copies of OCR-VQA need."""
    samples: Count | None = None
    """Use exactly so many of these records; more than there are repeats them."""
    weight: NonNegative | None = None
    """Use this share of these records: 0.1 is a tenth, 2 is each twice."""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        return _samples_or_weight(self)


class Part(StrictModel):
    """The records of one source's annotations, with the images that they name."""

    annotations: Name
    """The source whose annotation files are read, in their order."""
    files: tuple[RelativeName, ...] = ()
    """Only these annotation files of the source; by default all."""
    images: tuple[ImageMapping, ...] = ()
    """Where the images are; may be empty when no record has one."""
    policy: Policy = Policy()
    """What happens to records that are not in order."""
    expected_records: Count | None = None
    """Number of records in the files; another number is an error."""
    samples: Count | None = None
    """Use exactly so many of the part's good records; more than there are repeats them."""
    weight: NonNegative | None = None
    """Use this share of the part's good records: 0.1 is a tenth, 2 is each twice."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        return _samples_or_weight(self)


class MixtureSpec(StrictModel):
    """The samples that a stage trains on."""

    parts: Annotated[tuple[Part, ...], Field(min_length=1)]
    """What it is made of, in this order."""
    seed: Integer = 0
    """Seed of the choice where `samples` or `weight` ask for one."""
    expected_records: Count | None = None
    """Number of records of the finished mixture; another number is an error."""

    def source_names(self) -> tuple[list[str], list[str]]:
        """The sources whose annotations are read, and those whose images are used, each once, in order."""
        annotations = dict.fromkeys(part.annotations for part in self.parts)
        images = dict.fromkeys(mapping.source for part in self.parts for mapping in part.images)
        return list(annotations), list(images)


def _samples_or_weight(section: Any) -> Any:
    if section.samples is not None and section.weight is not None:
        raise ValueError(
            f"samples: {section.samples} and weight: {section.weight} exclude each other; keep one"
        )
    return section


def source_inputs(spec: HubSource | UrlSource | PathSource | ShapesSource) -> list[str]:
    """The files of this machine that a source is made of: archives and annotations, not folders of images.

    A rule can declare them as inputs, so that a replaced file is noticed.
    """
    local = spec if isinstance(spec, PathSource) else getattr(spec, "local", None)
    if local is None:
        return []
    from pathlib import Path

    images = [local.images] if local.images and not Path(local.images).expanduser().is_dir() else []
    return [str(Path(path).expanduser()) for path in [*images, *local.annotations]]
