"""What the report tells about the data: damaged files with what became of their samples, and a contact
sheet.
"""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from workflow_scripts.archives import DamagedMember, Listing, StoreReader, StoreType
from workflow_scripts.report.collect import Collected, Manifest

MOST_FILES = 60
MOST_SAMPLES = 8
MOST_TURNS = 6
# Bytes of a mixture that is searched for the samples of single images.
MOST_SEARCHED = 100_000_000
LONGEST_TEXT = 240
# A picture of more pixels is not decoded for a thumbnail.
MOST_PIXELS = 50_000_000
# A file of more bytes is not read for a thumbnail.
MOST_BYTES = 1 << 26


def thumbnail(data: bytes, side: int = 96) -> str | None:
    """A picture as a small data URI, as far as it can be decoded; None when it can't be."""
    from PIL import Image, ImageFile

    if not data:
        return None
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                return None
            picture.draft("RGB", (2 * side, 2 * side))
            small = picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    small.thumbnail((side, side))
    stream = io.BytesIO()
    small.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def opening(data: bytes, length: int = 44) -> str:
    """The first bytes as text, for files that show no picture."""
    return data[:length].decode("latin-1").translate(dict.fromkeys((*range(32), *range(127, 160)), "·"))


def stored_bytes(store: Path, kind: StoreType, rows: Sequence[Mapping[str, Any]]) -> Iterator[bytes]:
    """The bytes of each of a scan's rows; empty where they can't be read."""
    keys = ("header", "stored_size", "size", "method")
    header, stored, size, method = ([row[key] for row in rows] for key in keys)
    listing = Listing(kind, [row["name"] for row in rows], header, stored, size, method)
    try:
        with StoreReader(store, kind) as reader:
            for place in range(len(rows)):
                yield _bytes_of(reader, listing, place)
    except OSError:
        yield from [b""] * len(rows)


def _bytes_of(reader: StoreReader, listing: Listing, row: int) -> bytes:
    try:
        return reader.read(listing, row, MOST_BYTES).data
    except (DamagedMember, OSError):
        return b""


def _unusual(scan: Manifest) -> list[dict[str, Any]]:
    """The scan's rows that are not plainly good, a few of each kind first when there are too many to show."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table_path = scan[0].with_name("images.parquet")
    if not table_path.is_file():
        return []
    place = ["name", "header", "stored_size", "size", "method"]
    place += ["note"] if "note" in pq.read_schema(table_path).names else []
    table = pq.read_table(table_path, columns=[*place, "status", "wrong_suffix", "format", "detail"])
    odd = pc.or_(pc.not_equal(table["status"], "ok"), table["wrong_suffix"])
    if "note" in place:
        odd = pc.or_(odd, pc.not_equal(table["note"], ""))
    table = table.filter(odd)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in table.slice(0, 100_000).to_pylist():
        kinds.setdefault(_kind(row), []).append(row)
    share = max(1, MOST_FILES // max(1, len(kinds)))
    return [row for kind in sorted(kinds) for row in kinds[kind][:share]]


def _kind(row: Mapping[str, Any]) -> str:
    return str(row["status"] if row["status"] != "ok" else row.get("note") or "wrong suffix")


def _fates(found: Collected, source: str) -> dict[str, list[dict[str, str]]]:
    """By image name in the archive: what the mixtures did with the samples that use it."""
    fates: dict[str, list[dict[str, str]]] = {}
    for name, (_, mixture) in found.mixtures.items():
        for part in mixture["parts"]:
            roots = [root for root in part.get("roots", []) if root["source"] == source]
            for reason, examples in part["examples"].items():
                kept = reason.startswith("kept")
                for example in examples:
                    fate = {
                        "mixture": name,
                        "sample": str(example.get("id", "")),
                        "record": str(example.get("record", "")),
                    }
                    fate |= {"fate": "kept" if kept else "dropped", "reason": reason.removeprefix("kept: ")}
                    for member in _members(str(example.get("image", "")), roots):
                        fates.setdefault(member, []).append(fate)
    return fates


def _members(image: str, roots: list[dict[str, str]]) -> list[str]:
    """The names that an annotation's image may have inside the archive."""
    names = []
    for root in roots:
        prefix = root["prefix"].strip("/")
        if prefix and not image.startswith(prefix + "/"):
            continue
        rest = image[len(prefix) :].lstrip("/")
        names.append("/".join(filter(None, [root["root"].strip("/"), rest])))
    return names


def _uses(found: Collected, source: str, members: set[str]) -> dict[str, list[dict[str, str]]]:
    """By image name in the archive: the samples of the mixtures that use it. Large mixtures are not
    searched.
    """
    uses: dict[str, list[dict[str, str]]] = {}
    for name, (path, mixture) in found.mixtures.items():
        samples = path.with_name("samples.json")
        roots = [
            root for part in mixture["parts"] for root in part.get("roots", []) if root["source"] == source
        ]
        if not roots or not samples.is_file() or samples.stat().st_size > MOST_SEARCHED:
            continue
        for record in json.loads(samples.read_bytes()):
            images = record.get("image") or []
            for image in [images] if isinstance(images, str) else images:
                for member in members.intersection(_members(image, roots)):
                    use = {"mixture": name, "sample": str(record.get("id", "")), "record": "", "fate": "kept"}
                    uses.setdefault(member, []).append(use | {"reason": "decoded by its content"})
    return uses


def _unknown(found: Collected, source: str) -> dict[str, str]:
    """For a file of which no mixture tells anything here."""
    used = any(source in mixture.get("sources", []) for _, mixture in found.mixtures.values())
    return {
        "fate": "not shown" if used else "not used",
        "reason": "",
        "sample": "",
        "mixture": "",
        "record": "",
    }


def _damaged_rows(found: Collected, name: str) -> list[dict[str, Any]]:
    scan, source = found.scans[name], found.sources.get(name)
    fates, rows = _fates(found, name), []
    images = source[1]["images"] if source else None
    unusual = _unusual(scan)
    uses = _uses(found, name, {row["name"] for row in unusual if row["status"] == "ok"})
    stored = (
        stored_bytes(source[0].parent / images["path"], images["type"], unusual)
        if source and images
        else [b""] * len(unusual)
    )
    for row, data in zip(unusual, stored, strict=True):
        picture = thumbnail(data)
        rows.append(
            {
                "name": row["name"],
                "kind": _kind(row),
                "whole": row["status"] == "ok",
                "detail": row["detail"] or f"{row['format']} under this name",
                "thumbnail": picture,
                "opening": "" if picture else opening(data),
                "fates": fates.get(row["name"]) or uses.get(row["name"]) or [_unknown(found, name)],
            }
        )
    return rows


def _missing_rows(found: Collected, name: str) -> list[dict[str, Any]]:
    """Samples whose image is in no archive: only the mixtures know them."""
    rows = []
    for mixture_name, (_, mixture) in found.mixtures.items():
        for part in mixture["parts"]:
            if part["annotations"] != name and all(root["source"] != name for root in part.get("roots", [])):
                continue
            for example in part["examples"].get("missing", []):
                fate = {
                    "mixture": mixture_name,
                    "sample": str(example.get("id", "")),
                    "record": str(example.get("record", "")),
                }
                rows.append(
                    {
                        "name": str(example.get("image", "")),
                        "kind": "missing",
                        "whole": False,
                        "detail": str(example.get("detail", "")),
                        "thumbnail": None,
                        "opening": "",
                        "fates": [fate | {"fate": "dropped", "reason": "missing"}],
                    }
                )
    return rows


def source_cards(found: Collected) -> list[dict[str, Any]]:
    """One card a scanned source: counts by status, and its damaged files."""
    cards = []
    for name, (_, scan) in found.scans.items():
        rows = _damaged_rows(found, name) + _missing_rows(found, name)
        counts = dict(sorted(scan["counts"].items(), key=lambda item: item[0] != "ok"))
        noted = scan.get("seen_otherwise", {})
        bad = sum(number for status, number in counts.items() if status != "ok")
        unusual = bad + scan.get("wrong_suffix", 0) + sum(noted.values())
        missing = sum(row["kind"] == "missing" for row in rows)
        cards.append(
            {
                "name": name,
                "store": (scan.get("store") or {}).get("type", "none"),
                "images": scan["images"],
                "megabytes": scan.get("bytes", 0) / 1e6,
                "counts": counts,
                "wrong_suffix": scan.get("wrong_suffix", 0),
                "seen_otherwise": noted,
                "formats": scan.get("formats", {}),
                "rows": rows,
                "more": max(0, unusual + missing - len(rows)),
            }
        )
    return cards


def mixture_cards(found: Collected) -> list[dict[str, Any]]:
    """One card a mixture: what came in, what was dropped and why, and some samples."""
    cards = []
    for name, (path, mixture) in found.mixtures.items():
        samples, problem = contact_sheet(path)
        cards.append(
            {
                "name": name,
                "records": mixture["records"],
                "images": mixture.get("images"),
                "text_only": mixture.get("text_only"),
                "parts": mixture["parts"],
                "surveys": survey_cards(found, name),
                "samples": samples,
                "problem": problem,
            }
        )
    return cards


def survey_cards(found: Collected, mixture: str) -> list[dict[str, Any]]:
    """One card a survey of the mixture: lengths, what is cut and what has no label, for each way in which an
    image takes tokens.
    """
    from workflow_scripts.report import plots

    cards = []
    for _, content in found.surveys.values():
        if content["mixture"] != mixture:
            continue
        layouts = sorted(content["layouts"], key=lambda layout: -layout["tokens_per_image"])
        bars = [(place, *_bars(layout["histogram"])) for place, layout in enumerate(layouts)]
        spoken = "; ".join(
            f"{layout['tokens_per_image']} tokens per image: median {layout['all']['length']['median']},"
            f" longest {layout['all']['length']['longest']}"
            for layout in layouts
        )
        label = f"Samples of {mixture} by their length in tokens. {spoken}. The table below has more"
        cards.append(
            {
                "prompt_version": content["prompt_version"],
                "model_max_length": content["model_max_length"],
                "figure": plots.length_figure(bars, content["model_max_length"], label),
                "rows": [{**layout, "colour": plots.colour(place)} for place, layout in enumerate(layouts)],
            }
        )
    return cards


def _bars(histogram: dict[str, Any]) -> tuple[list[int], list[int]]:
    both = zip(histogram["with_picture"], histogram["text_only"], strict=True)
    return histogram["edges"], [sum(pair) for pair in both]


def contact_sheet(manifest: Path, number: int = MOST_SAMPLES) -> tuple[list[dict[str, Any]], str]:
    """Random samples of a mixture with pictures and conversations, always the same ones; or why there are
    none.
    """
    from llava_ext.data.samples import SamplesError, open_samples

    sheet: list[dict[str, Any]] = []
    try:
        store = open_samples(manifest.with_name("samples.json"), None)
        for index in sorted(random.Random(0).sample(range(len(store)), min(number, len(store)))):
            record = store.record(index)
            turns = record.get("conversations", [])
            sheet.append(
                {
                    "id": str(record.get("id", index)),
                    "source": store.source(index),
                    "thumbnails": [thumbnail(data) for data in store.image_bytes(index)[:2]],
                    "turns": [
                        (str(turn.get("from", "")), _short(str(turn.get("value", ""))))
                        for turn in turns[:MOST_TURNS]
                    ],
                    "more": max(0, len(turns) - MOST_TURNS),
                }
            )
    except (OSError, SamplesError) as error:
        return sheet, str(error)
    return sheet, ""


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"
