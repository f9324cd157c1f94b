"""Shows what a mixture (or a LLaVA JSON) is made of: counts, lengths, damage, random samples with their
pictures.

    python -m workflow_scripts.inspect data/mixtures/M [--html sheet.html]
    python -m workflow_scripts.inspect my.json --image-folder pictures --tokenizer models/vicuna/model

Lengths are in words; with a tokenizer, in tokens of the prompt that training would see (without the image's
own tokens, whose number is the model's affair; `--image-tokens 576` adds them).
"""

from __future__ import annotations

import argparse
import html
import itertools
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_ext.data.templates import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
    TEMPLATES,
    ConversationError,
)
from llava_ext.files import write_text
from workflow_scripts.command_line import command_line
from workflow_scripts.io import UserError, progress, read_json, user_errors

if TYPE_CHECKING:
    import numpy as np

    from llava_ext.data.samples import SampleStore

EDGES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Lower ends of the histogram's classes; the last one is open."""
BAR = 40


@dataclass(frozen=True)
class SourceFacts:
    """One source's row."""

    name: str
    records: int
    text_only: int
    images: int
    damaged_kept: int
    lengths: np.ndarray
    """Lengths of the records that were measured."""

    def quantiles(self) -> tuple[int, int, int]:
        """Median, 95 % quantile and maximum of the lengths."""
        import numpy as np

        if not len(self.lengths):
            return 0, 0, 0
        return tuple(int(value) for value in np.quantile(self.lengths, (0.5, 0.95, 1.0)))  # type: ignore[return-value]

    def histogram(self) -> list[int]:
        """Records in each class of EDGES."""
        import numpy as np

        counts, _ = np.histogram(self.lengths, bins=[*EDGES, np.inf])
        return [int(count) for count in counts]


@dataclass(frozen=True)
class Overview:
    """Everything that is shown."""

    title: str
    unit: str
    sources: list[SourceFacts]
    dropped: list[dict[str, Any]]
    """The parts' reports of the mixture's manifest; empty for a plain JSON."""


# ----------------------------------------------------------------------------------------------------
# Measuring


def overview(
    store: SampleStore, tokenizer: Any = None, version: str = "v1", limit: int = 20_000, extra: int = 0
) -> Overview:
    """Counts every record; measures token lengths of up to ``limit`` records of each source, by seed."""
    import numpy as np

    source = store.source_numbers
    lengths = np.abs(store.lengths.astype(np.int64))
    facts = []
    for number, name in enumerate(store.sources):
        mine = np.flatnonzero(source == number)
        if tokenizer is None:
            measured = lengths[mine]
        else:
            measured = token_lengths(store, _some(mine, limit), tokenizer, version, extra, name)
        facts.append(_facts(store, name, mine, measured))
    manifest = store.path.with_name("manifest.json")
    dropped = read_json(manifest)["parts"] if manifest.is_file() and "parts" in read_json(manifest) else []
    return Overview(str(store.path), "words" if tokenizer is None else "tokens", facts, dropped)


def _facts(store: SampleStore, name: str, mine: np.ndarray, measured: np.ndarray) -> SourceFacts:
    from llava_ext.data.samples import MixtureStore

    text_only = int((store.lengths[mine] < 0).sum())
    images, tolerant = len(mine) - text_only, 0
    if isinstance(store, MixtureStore):
        images = int(store.records["n_images"][mine].sum())
        tolerant = store.count_tolerant(mine)
    return SourceFacts(name, len(mine), text_only, images, tolerant, measured)


def _some(rows: np.ndarray, limit: int) -> list[int]:
    chosen = rows.tolist()
    return chosen if len(chosen) <= limit else sorted(random.Random(0).sample(chosen, limit))


def token_lengths(
    store: SampleStore, rows: Sequence[int], tokenizer: Any, version: str, extra: int, name: str
) -> np.ndarray:
    """Tokens of the prompts, each image counted as ``extra`` tokens."""
    import numpy as np

    from llava_ext.data.conversation import encode

    found = []
    for row in progress(rows, len(rows), f"tokenizing {name}"):
        try:
            ids = np.asarray(encode(store.record(row), tokenizer, version, 1 << 30).input_ids)
        except ConversationError as error:
            raise UserError(
                f"{store.path}: record {row + 1}: {error}; is --prompt-version {version} right?"
            ) from None
        images = int((ids == -200).sum())
        found.append(len(ids) + images * (extra - 1 if extra else -1))
    return np.array(found, np.int64)


# ----------------------------------------------------------------------------------------------------
# Text


def as_text(view: Overview) -> str:
    """A table and one histogram a source."""
    total = sum(facts.records for facts in view.sources)
    lines = [f"{view.title}: {total} records", ""]
    head = ("source", "records", "share", "text only", "images", "damaged", "median", "95 %", "max")
    rows = [head, *(_row(facts, total) for facts in view.sources)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        lines.append(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )
    lines.append(f"(lengths in {view.unit}; damaged: truncated or corrupt images that the policy keeps)")
    for facts in view.sources:
        lines += ["", f"{facts.name}: {view.unit} a record", *_bars(facts)]
    return "\n".join([*lines, "", *_part_lines(view.dropped)])


def _row(facts: SourceFacts, total: int) -> tuple[str, ...]:
    share = f"{100 * facts.records / max(total, 1):.1f} %"
    quantiles = (str(value) for value in facts.quantiles())
    return (
        facts.name,
        str(facts.records),
        share,
        str(facts.text_only),
        str(facts.images),
        str(facts.damaged_kept),
        *quantiles,
    )


def _label(index: int) -> str:
    return f"{EDGES[index]}+" if index == len(EDGES) - 1 else f"{EDGES[index]}-{EDGES[index + 1] - 1}"


def _bars(facts: SourceFacts) -> list[str]:
    counts = facts.histogram()
    most = max(1, *counts)
    return [
        f"  {_label(i):>9} {count:>8} {'#' * max(1, round(BAR * count / most))}"
        for i, count in enumerate(counts)
        if count
    ]


def _part_lines(parts: Iterable[dict[str, Any]]) -> list[str]:
    lines = []
    for part in parts:
        bad = sum(part["dropped"].values())
        share = 100 * bad / max(part["records"], 1)
        why = ", ".join(f"{count} {reason}" for reason, count in part["dropped"].items()) or "none"
        lines.append(
            f"{part['annotations']}: {part['records']} records read, {bad} dropped ({share:.2f} %): {why}"
        )
        for reason, examples in part["examples"].items():
            lines += [
                f"  {reason}: {e['record']}: {e.get('image', '')} ({e['detail']})" for e in examples[:3]
            ]
    return lines


# ----------------------------------------------------------------------------------------------------
# HTML

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
color: #222 } table { border-collapse: collapse } th, td { padding: .2rem .7rem; text-align: right;
border-bottom: 1px solid #ddd } th:first-child, td:first-child { text-align: left } .sheet { display:
grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)) } .card { border: 1px
solid #ddd; border-radius: 6px; padding: .7rem; overflow-wrap: anywhere } .card img { max-width: 100%;
border-radius: 4px } .who { color: #777; font-size: .8em; display: block } .bar { background: #7aa6d8;
height: .8em; display: inline-block; vertical-align: middle } .note { color: #777 } p.turn { margin:
.4rem 0; white-space: pre-wrap } mark { background: #cfe8c9 }
"""


def as_html(view: Overview, cards: Sequence[str]) -> str:
    """One page without any outside reference; all text from the data is escaped."""
    total = sum(facts.records for facts in view.sources)
    head = ("source", "records", "share", "text only", "images", "damaged, kept", "median", "95 %", "max")
    body = [f"<h1>{html.escape(view.title)}</h1><p>{total} records; lengths in {view.unit}</p><table><tr>"]
    body += [f"<th>{name}</th>" for name in head] + ["</tr>"]
    for facts in view.sources:
        body.append(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _row(facts, total)) + "</tr>"
        )
    body.append("</table>")
    body += [_html_histogram(facts, view.unit) for facts in view.sources]
    body.append(
        "<h2>Dropped records</h2><pre>" + html.escape("\n".join(_part_lines(view.dropped))) + "</pre>"
    )
    body += ["<h2>Random samples</h2><div class=sheet>", *cards, "</div>"]
    title = html.escape(Path(view.title).parent.name)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _html_histogram(facts: SourceFacts, unit: str) -> str:
    counts = facts.histogram()
    most = max(1, *counts)
    rows = [
        f'<tr><td>{_label(i)}</td><td>{count}</td><td style="text-align:left"><span class=bar '
        f'style="width:{24 * count / most:.2f}rem"></span></td></tr>'
        for i, count in enumerate(counts)
        if count
    ]
    return f"<h3>{html.escape(facts.name)}: {unit} a record</h3><table>{''.join(rows)}</table>"


def sample_cards(
    store: SampleStore, number: int, seed: int = 0, tokenizer: Any = None, version: str = "v1"
) -> list[str]:
    """HTML cards of random samples: pictures, conversation, where it is from; with a tokenizer what training
    sees of it.
    """
    rows = sorted(random.Random(seed).sample(range(len(store)), min(number, len(store))))
    seen = [training_text(store.record(row), tokenizer, version) if tokenizer else "" for row in rows]
    return [sample_card(store, row, text) for row, text in zip(rows, seen, strict=True)]


def training_text(record: dict[str, Any], tokenizer: Any, version: str) -> str:
    """The tokens of a sample as HTML: those with a label are marked."""
    from llava_ext.data.conversation import encode

    try:
        encoded = encode(record, tokenizer, version, 1 << 30)
    except ConversationError as error:
        return f"<p class=note>can't be encoded: {html.escape(str(error))}</p>"
    pairs, pieces, labels = list(zip(encoded.input_ids, encoded.labels, strict=True)), [], 0
    for (is_label, is_image), run in itertools.groupby(
        pairs, lambda pair: (pair[1] != IGNORE_INDEX, pair[0] == IMAGE_TOKEN_INDEX)
    ):
        ids = [token for token, _ in run]
        text = html.escape(IMAGE_TOKEN * len(ids) if is_image else tokenizer.decode(ids))
        labels += len(ids) * is_label
        pieces.append(f"<mark>{text}</mark>" if is_label else text)
    why = ", masked whole by a mismatch" if encoded.mismatch else ""
    head = f"{len(pairs)} tokens, {labels} with a label{why}"
    return f"<details><summary class=who>{head}</summary><p class=turn>{''.join(pieces)}</p></details>"


def sample_card(store: SampleStore, row: int, seen: str = "", side: int = 320) -> str:
    """One sample as a self-contained piece of HTML, with ``seen`` at its end."""
    from llava_ext.data.samples import SamplesError

    record = store.record(row)
    origin = f"{store.source(row)}, record {row + 1}, id {record.get('id')}"
    shown = [f"<div class=card><span class=who>{html.escape(origin)}</span>"]
    try:
        shown += [_picture(data, side) for data in store.image_bytes(row)]
    except SamplesError as error:
        shown.append(f"<p class=note>{html.escape(str(error))}</p>")
    if any(store.tolerant(row)):
        shown.append("<p class=note>truncated; kept by the policy</p>")
    for turn in record["conversations"]:
        text = turn["value"] if len(turn["value"]) <= 600 else turn["value"][:600] + " ..."
        shown.append(
            f"<p class=turn><span class=who>{html.escape(turn['from'])}</span>{html.escape(text)}</p>"
        )
    return "".join([*shown, seen, "</div>"])


def _picture(data: bytes, side: int) -> str:
    from workflow_scripts.report.data import thumbnail

    found = thumbnail(data, side)
    return f'<img alt="" src="{found}">' if found else "<p class=note>can't be decoded</p>"


# ----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_line("inspect", __doc__)
    parser.add_argument("data", type=Path, help="a mixture's folder, or a LLaVA JSON")
    parser.add_argument("--image-folder", type=Path, help="with a LLaVA JSON: where its images are")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="a model folder: measure tokens instead of words, and mark on the page what has a label",
    )
    parser.add_argument("--prompt-version", default="v1", choices=list(TEMPLATES), help="with --tokenizer")
    parser.add_argument("--image-tokens", type=int, default=0, help="with --tokenizer: tokens an image adds")
    parser.add_argument(
        "--limit", type=int, default=20_000, help="records a source to tokenize (%(default)s)"
    )
    parser.add_argument("--html", type=Path, help="also write a page with random samples")
    parser.add_argument("--samples", type=int, default=24, help="samples on the page (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which samples (%(default)s)")
    return parser.parse_args(argv)


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Shows a mixture."""
    from llava_ext.data.samples import SamplesError, open_samples

    options = parse(argv)
    try:
        store = open_samples(options.data, options.image_folder)
        tokenizer = None
        if options.tokenizer is not None:
            from llava_ext.model.folders import load_tokenizer

            tokenizer = load_tokenizer(options.tokenizer)
        view = overview(store, tokenizer, options.prompt_version, options.limit, options.image_tokens)
        print(as_text(view))
        if options.html is not None:
            cards = sample_cards(store, options.samples, options.seed, tokenizer, options.prompt_version)
            write_text(options.html, as_html(view, cards))
            print(f"\npage: {options.html}", file=sys.stderr)
    except SamplesError as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    main()
