"""What data there are: the sections of the kinds of source."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from workflow_scripts.config.base import StrictModel
from workflow_scripts.config.types import Positive
from workflow_scripts.secrets import REFERENCE, is_secret, public

LONGEST_NAME = 200
"""Bytes of a file's name: what is written beside it has longer names, and 255 are the end."""
OUR_FILES = re.compile(
    r"\.listing\.json|\..*\.(provenance\.json|lock|tmp)|.*\.part(\.json)?|.*\.wrong-[0-9a-f]{8}"
)
Role = Literal["images", "annotations", "other"]


def _lower_sha256(value: Any) -> Any:
    if value is None or (isinstance(value, str) and re.fullmatch(r"[0-9a-fA-F]{64}", value)):
        return value.lower() if value else value
    raise ValueError(f"{value!r} is no sha256: write the 64 hexadecimal digits in quotes, or leave it out")


def _http_url(value: str) -> str:
    """No message has the value where it may be secret: it would be in logs."""
    shown = public(value)
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError(
            "found an address that can't be read; write http:// or https://, a host and a path"
        ) from None
    if parts.username or parts.password:
        raise ValueError(f"found a login in the URL {shown}; put it into ~/.netrc")
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"found {shown!r}, no URL that can be fetched; begin it with http:// or https://")
    for name, text in parse_qsl(parts.query, keep_blank_values=True):
        if is_secret(name, text):
            raise ValueError(
                f"found a literal value of {name} in the URL {shown}, which would be in logs; write "
                f"{name}=${{SOME_NAME}} and export SOME_NAME in the shell that starts Snakemake"
            )
    return value


def _relative_name(value: str) -> str:
    parts = value.split("/")
    if value.startswith("/") or "\\" in value or any(p in ("", ".", "..") for p in parts):
        raise ValueError(f"{value!r} must be a plain path inside the source, with / and without '..'")
    if not value.isprintable():
        raise ValueError(f"{value!r} has characters that can't be printed; leave them out")
    if any(len(part.encode()) > LONGEST_NAME for part in parts):
        raise ValueError(f"{value[:40]!r}... has a part of more than {LONGEST_NAME} bytes; shorten it")
    return value


def _file_name(value: str) -> str:
    """A file's name in the source's folder, where our own files are too."""
    if value == "manifest.json" or OUR_FILES.fullmatch(value.rsplit("/", 1)[-1]):
        raise ValueError(
            f"{value!r} is the name of one of the workflow's own files in the source's folder; give it"
            " another `name` (a file of a hub has none: name a copy under `local`)"
        )
    return value


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _numbered(value: Any) -> Any:
    """Entries whose path has a range of numbers, once for each number."""
    if not isinstance(value, list | tuple):
        return value
    found: list[Any] = []
    for entry in value:
        path = str(entry.get("path", "")) if isinstance(entry, dict) else ""
        span = re.search(r"\{(\d+)\.\.(\d+)\}", path)
        if span is None:
            found.append(entry)
            continue
        numbers = range(int(span[1]), int(span[2]) + 1)
        names = (path.replace(span[0], f"{number:0{len(span[1])}}") for number in numbers)
        found += [{**entry, "path": name} for name in names]
    return found


Sha256 = Annotated[str | None, BeforeValidator(_lower_sha256)]
Url = Annotated[str, AfterValidator(_http_url)]
Urls = Annotated[tuple[Url, ...], BeforeValidator(_one_or_more), Field(min_length=1)]
RelativeName = Annotated[str, AfterValidator(_relative_name), Field(min_length=1)]
FileName = Annotated[RelativeName, AfterValidator(_file_name)]
Paths = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]


class RemoteFile(StrictModel):
    """What is known of a file before it is fetched; kinds add where it is, and ``name``, its path on the
    disk.
    """

    role: Role
    """`images` (an archive, at most one a source), `annotations` (LLaVA JSON or JSON lines; for evaluations
    also CSV or parquet) or `other`."""
    bytes: Positive | None = None
    """Size; a download of another size is refused before it begins."""
    about_gb: Annotated[float, Field(gt=0)] | None = None
    """Size for the plan where the exact one is not known."""
    sha256: Sha256 = None
    """Hash; verified while the file streams in."""
    trust: Literal["publisher", "first_use"] = "publisher"
    """`publisher`: another hash is an error. `first_use`: the hash was read from a copy that somebody
    uploaded again, so that another one is recorded with a warning.
    """


class HubFile(RemoteFile):
    """A file of a Hugging Face repository."""

    path: FileName
    """Path inside the repository. `*` and `?` stand for parts of names, in files of role `annotations` or
    `other`: `data/test-*.parquet` is every file of the pinned commit that is called so. `about_gb` is the
    size of all of them.
    """
    mirrors: Annotated[tuple[Url, ...], BeforeValidator(_one_or_more)] = ()
    """URLs of the same file, tried in order when the hub does not give it."""

    @property
    def name(self) -> str:
        """The file's path below the source's folder."""
        return self.path

    @property
    def is_pattern(self) -> bool:
        """Whether the repository says which files are meant."""
        return "*" in self.path or "?" in self.path

    @model_validator(mode="after")
    def _pattern_says_no_file(self) -> Self:
        if self.is_pattern and (self.role == "images" or self.bytes or self.sha256 or self.mirrors):
            raise ValueError(
                f"path: {self.path!r} may be several files, so role: images, bytes, sha256 and mirrors, which"
                " are of one, do not go with it; name the file, or leave these out"
            )
        return self


class UrlFile(RemoteFile):
    """A file on a web server."""

    url: Urls
    """Where it is; several URLs are mirrors, tried in order. A signature or key in it is written as
    `${NAME}` and taken from the environment when the file is fetched.
    """
    name: FileName = ""
    """Name on the disk; by default the last part of the first URL."""

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("name") and data.get("url"):
            first = data["url"] if isinstance(data["url"], str) else data["url"][0]
            name = unquote(urlsplit(public(str(first))).path).rsplit("/", 1)[-1]
            if not name or REFERENCE.search(name):
                raise ValueError(f"url: {public(str(first))} does not end in a file name; add `name:`")
            return {**data, "name": name}
        return data


class LocalFiles(StrictModel):
    """Files that are already on this machine, used where they lie instead of a download."""

    images: str | None = None
    """A zip, a tar or a folder."""
    annotations: Paths = ()
    """LLaVA JSON or JSON-lines files; for evaluations also CSV or parquet."""

    def paths(self) -> list[tuple[str, str]]:
        """(key, path) of each."""
        images = [("images", self.images)] if self.images else []
        return images + [("annotations", path) for path in self.annotations]

    def files(self) -> list[str]:
        """All of them, but for folders of images: a rule can declare them as inputs, so a replaced one is
        noticed.
        """
        paths = [(key, Path(path).expanduser()) for key, path in self.paths()]
        return [str(path) for key, path in paths if key != "images" or not path.is_dir()]


class Source(StrictModel):
    """What all kinds of source have; ``workflow_scripts.sources`` lists the kinds."""

    kind: str

    def remote(self) -> tuple[RemoteFile, ...]:
        """The files to fetch."""
        return ()

    def own(self) -> LocalFiles:
        """The user's own files, which are used in place."""
        return LocalFiles()

    def replaced(self, file: RemoteFile) -> bool:
        """True when the user's own copy takes the place of ``file``."""
        own = self.own()
        return bool(file.role == "images" and own.images) or bool(
            file.role == "annotations" and own.annotations
        )


class _Fetched(Source):
    expected_images: Positive | None = None
    """Number of image files; the scan warns when it finds another number."""
    local: LocalFiles = LocalFiles()
    """Copies that you already have, used in place; a given part replaces the download of that part."""

    def own(self) -> LocalFiles:
        """Copies that take the place of downloads."""
        return self.local

    @model_validator(mode="after")
    def _one_store(self) -> Self:
        files = self.remote()
        names = [str(getattr(file, "name", "")) for file in files]
        if sum(file.role == "images" for file in files) > 1:
            raise ValueError(
                "files: two files have role: images; an archive is a source of its own, so split them"
            )
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"files: two files are called {name!r}; give one another `name`")
            if any(other.startswith(f"{name}/") for other in names):
                raise ValueError(
                    f"files: {name!r} is a file and a folder of another; give one another `name`"
                )
        return self


class HubSource(_Fetched):
    """Files of a Hugging Face repository at a pinned revision."""

    kind: Literal["hub"] = "hub"
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    """`owner/name`."""
    repo_type: Literal["dataset", "model"] = "dataset"
    """What the repository is."""
    revision: Annotated[str, Field(min_length=1)]
    """Commit (full, or its first 7 digits or more), tag or branch. A branch can move: what it is at the first
    fetch is noted and stays so in this working folder; name a commit to fetch the same elsewhere, or
    a newer one.
    """
    files: Annotated[tuple[HubFile, ...], BeforeValidator(_numbered), Field(min_length=1)]
    """The files to fetch. `{00000..00067}` in a path stands for a file with each of these numbers."""
    connections_per_host: Annotated[Positive, Field(le=16)] = 2
    """Downloads at a time from one host."""

    def remote(self) -> tuple[RemoteFile, ...]:
        """The files to fetch."""
        return self.files


class UrlSource(_Fetched):
    """Files on web servers."""

    kind: Literal["url"] = "url"
    files: Annotated[tuple[UrlFile, ...], Field(min_length=1)]
    """The files to fetch."""
    connections_per_host: Annotated[Positive, Field(le=16)] = 2
    """Downloads at a time from one host; some hosts answer 503 to more than one."""

    def remote(self) -> tuple[RemoteFile, ...]:
        """The files to fetch."""
        return self.files


class PathSource(Source):
    """Data that are on this machine already and are used where they lie: nothing is copied or changed."""

    kind: Literal["path"] = "path"
    images: str | None = None
    """A zip, a tar or a folder."""
    annotations: Paths = ()
    """LLaVA JSON or JSON-lines files; for evaluations also CSV or parquet."""
    sha256: dict[str, Sha256] = Field(default_factory=dict)
    """Hashes to verify, by file name; without one a big archive is identified by its size and its table of
    contents, which takes no time."""
    expected_images: Positive | None = None
    """Number of image files; the scan warns when it finds another number."""

    def own(self) -> LocalFiles:
        """All of it."""
        return LocalFiles(images=self.images, annotations=self.annotations)

    @model_validator(mode="after")
    def _images_or_annotations(self) -> Self:
        if self.images is None and not self.annotations:
            raise ValueError("a path source needs `images`, `annotations` or both")
        return self
