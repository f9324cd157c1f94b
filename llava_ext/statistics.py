"""How much of the data teaches something: supervised tokens and tokenization mismatches, per source.

``python -m llava_ext.statistics --data_path samples.json --tokenizer vicuna-7b-v1.5 --version v1``
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .data.templates import TEMPLATES, described
from .errors import TrainingError, say

if TYPE_CHECKING:
    from .data.dataset import EncodedSamples

EXAMPLES = 5


@dataclass
class Counts:
    """What was seen of one source."""

    samples: int = 0
    with_image: int = 0
    tokens: int = 0
    supervised: int = 0
    mismatches: int = 0
    unsupervised: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, encoded: Any, has_image: bool, name: str) -> None:
        """Adds one encoded sample."""
        supervised = sum(1 for label in encoded.labels if int(label) >= 0)
        self.samples += 1
        self.with_image += has_image
        self.tokens += len(encoded.input_ids)
        self.supervised += supervised
        self.unsupervised += supervised == 0
        if encoded.mismatch:
            self.mismatches += 1
            if len(self.examples) < EXAMPLES:
                self.examples.append(name)

    def merge(self, other: Counts) -> None:
        """Adds another source's counts."""
        for name in ("samples", "with_image", "tokens", "supervised", "mismatches", "unsupervised"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.examples = (self.examples + other.examples)[:EXAMPLES]

    @property
    def supervised_share(self) -> float:
        """Share of the text tokens that carry a label."""
        return self.supervised / self.tokens if self.tokens else 0.0

    @property
    def mismatch_share(self) -> float:
        """Share of the samples that are masked whole because lengths did not add up."""
        return self.mismatches / self.samples if self.samples else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All numbers as JSON values."""
        return vars(self) | {"supervised_share": self.supervised_share, "mismatch_share": self.mismatch_share}


def survey(samples: EncodedSamples, indices: Iterable[int]) -> dict[str, Counts]:
    """Encodes the given samples' text and counts per source."""
    found: dict[str, Counts] = {}
    for index in indices:
        encoded = samples.text(index)
        source = samples.store.source(index)
        has_image = int(samples.store.lengths[index]) > 0
        found.setdefault(source, Counts()).add(encoded, has_image, samples.describe(index))
    return found


def total(found: dict[str, Counts]) -> Counts:
    """All sources together."""
    whole = Counts()
    for counts in found.values():
        whole.merge(counts)
    return whole


def spread(count: int, wanted: int) -> list[int]:
    """``wanted`` indices spread evenly over ``count`` samples (all of them if there are fewer, or if 0 is
    wanted).
    """
    if not wanted or wanted >= count:
        return list(range(count))
    return [place * count // wanted for place in range(wanted)]


def check_bounds(found: dict[str, Counts], supervised_bound: float, mismatch_bound: float) -> None:
    """Stops a training whose data would teach nothing.

    Raises:
        TrainingError: names the source, the share, the bound and examples.
    """
    for source, counts in found.items():
        if mismatch_bound < 1 and counts.mismatch_share > mismatch_bound:
            raise TrainingError(
                f"source {source}: {counts.mismatches} of {counts.samples} samples are masked whole by a"
                f" tokenization mismatch ({counts.mismatch_share:.1%}, allowed by --mismatch_bound:"
                f" {mismatch_bound:.1%}), for example\n  "
                + "\n  ".join(counts.examples)
                + "\nThe tokenizer does not fit the conversation template, or the texts hold its separators. "
                "`python -m llava_ext.statistics` counts them all."
            )
    whole = total(found)
    if whole.tokens and whole.supervised_share < supervised_bound:
        raise TrainingError(
            f"only {whole.supervised} of {whole.tokens} tokens carry a label ({whole.supervised_share:.2%},"
            f" --supervised_share_bound: {supervised_bound:.2%}): check --version and --model_max_length with"
            " `python -m llava_ext.statistics`"
        )


def table(found: dict[str, Counts]) -> str:
    """The counts as text, a line a source."""
    head = ("source", "samples", "images", "tokens", "supervised", "mismatches", "no label")
    rows = [head]
    for name, counts in [*sorted(found.items()), *([("all", total(found))] if len(found) > 1 else [])]:
        rows.append(
            (
                name,
                str(counts.samples),
                str(counts.with_image),
                str(counts.tokens),
                f"{counts.supervised_share:.1%}",
                f"{counts.mismatches} ({counts.mismatch_share:.1%})",
                str(counts.unsupervised),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_ext.statistics", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data_path", required=True, help="LLaVA-format JSON or a mixture's samples.json")
    parser.add_argument("--image_folder", help="folder of the JSON's images (they are not read)")
    parser.add_argument("--tokenizer", "--model_name_or_path", required=True, help="the LLM's folder")
    parser.add_argument(
        "--version", default="v1", choices=list(TEMPLATES), help=f"prompt template: {described()}"
    )
    parser.add_argument("--model_max_length", type=int, default=2048)
    parser.add_argument(
        "--samples", type=int, default=0, help="look at so many samples, evenly spread (0: all)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    try:
        found = _survey_files(options)
    except (TrainingError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if options.json:
        print(json.dumps({name: counts.to_dict() for name, counts in found.items()}, indent=2))
        return
    print(table(found))
    for name, counts in found.items():
        for example in counts.examples:
            say(f"mismatch in {name}: {example}")


def _survey_files(options: argparse.Namespace) -> dict[str, Counts]:
    from .data.dataset import EncodedSamples
    from .data.samples import open_samples
    from .model.folders import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer, options.model_max_length)
    store = open_samples(options.data_path, options.image_folder or ".")
    samples = EncodedSamples(store, tokenizer, options.version, options.model_max_length, _no_image)
    return survey(samples, spread(len(store), options.samples))


def _no_image(data: bytes, tolerant: bool) -> Any:
    raise AssertionError("images are not read for statistics")


if __name__ == "__main__":
    main()
