"""How data are put together (`mixtures`)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from llava_ext.data.record_kinds import KINDS, Action, checked_actions
from workflow_scripts.config.base import StrictModel
from workflow_scripts.config.sources import RelativeName
from workflow_scripts.config.types import Count, Name, NonNegative, Seed, Share

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


RecordActions = Annotated[
    dict[str, Action],
    AfterValidator(checked_actions),
    Field(json_schema_extra={"propertyNames": {"enum": list(KINDS)}}),
]


class Policy(StrictModel):
    """What happens to a record whose image is not in order. `keep` trains on what can be decoded, `drop`
    leaves the record out and says so in the mixture's report, `fail` stops before anything is trained.
    """

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
    records: RecordActions = Field(default_factory=dict)
    """What happens to records whose turns or placeholders are odd, by kind of finding: `fix`, `keep`,
    `drop` or `fail`; the kinds with their default actions are in docs/data.md.
    """
    max_dropped_share: Share = 0.01
    """More dropped records than this share of the part is an error."""


class ImageMapping(StrictModel):
    """Where the images are whose path in the annotations begins with `prefix`."""

    prefix: str = ""
    """Beginning of the path, whole folders: `coco/train2017` takes coco/train2017/1.jpg; empty takes
    everything. The longest matching prefix wins; the same prefix again is a fallback for images that are
    missing or bad.
    """
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


def _names(given: Any) -> Any:
    """A text with commas between, as `--skip_samples` takes it, is a list too."""
    return [name.strip() for name in given.split(",") if name.strip()] if isinstance(given, str) else given


def _without_comma(name: str) -> str:
    if "," in name or not name.strip():
        raise ValueError(f"{name!r}: an id without a comma, or a record's number as '#12', is allowed")
    return name.strip()


SkippedName = Annotated[str, AfterValidator(_without_comma)]


class MixtureSpec(StrictModel):
    """The samples that a stage trains on."""

    # What a training that has begun goes on without: it is recorded with the training, and makes no other
    # run.
    NOT_IN_RECIPE: ClassVar[frozenset[str]] = frozenset({"skip_samples"})

    parts: Annotated[tuple[Part, ...], Field(min_length=1)]
    """What it is made of, in this order."""
    seed: Seed = 0
    """Seed of the choice where `samples` or `weight` ask for one."""
    expected_records: Count | None = None
    """Number of records of the finished mixture; another number is an error."""
    skip_samples: Annotated[tuple[SkippedName, ...], BeforeValidator(_names)] = ()
    """Records of the finished mixture that trainings leave out: ids, or numbers in quotes, `"#12"`. A
    training that has begun goes on without them; nothing is merged or trained again.
    """

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
