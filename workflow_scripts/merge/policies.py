"""What happens to the records of a part: kept, dropped with a reason, or a stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llava_ext.data.record_kinds import KINDS
from workflow_scripts.config.mixtures import Part
from workflow_scripts.io import UserError
from workflow_scripts.merge.annotations import EXAMPLES, Records, record_id
from workflow_scripts.merge.joins import Join, Store

KEEP, DROP, FAIL = 0, 1, 2
_ACTIONS = {"keep": KEEP, "drop": DROP, "fail": FAIL}


@dataclass
class Outcome:
    """Which records of a part stay, and the report of the others."""

    keep: np.ndarray
    dropped: dict[str, int] = field(default_factory=dict)
    kept_damaged: dict[str, int] = field(default_factory=dict)
    seen_otherwise: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def drop(self, reason: str, example: dict[str, Any] | None) -> None:
        """Counts a dropped record and keeps the first few as examples."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self._example(reason, example)

    def _example(self, reason: str, example: dict[str, Any] | None) -> None:
        if example is not None and len(self.examples.setdefault(reason, [])) < EXAMPLES:
            self.examples[reason].append(example)

    def wants_example(self, reason: str) -> bool:
        """True while there are few examples of ``reason``."""
        return len(self.examples.get(reason, ())) < EXAMPLES


def apply_policy(part: Part, records: Records, join: Join, stores: dict[str, Store]) -> Outcome:
    """Decides about every record. Raises :class:`UserError` where the policy says `fail`, and when too
    many drop.
    """
    _check_expected(part, records)
    outcome = Outcome(np.ones(len(records), bool))
    _malformed(part, records, outcome)
    _findings(part, records, outcome)
    _unmapped(part, records, join)
    _images(part, records, join, stores, outcome)
    _seen_otherwise(records, join, stores, outcome)
    _duplicates(part, records, outcome)
    total = records.total
    dropped = sum(outcome.dropped.values())
    if dropped > part.policy.max_dropped_share * total:
        raise UserError(_too_many(part, outcome, dropped, total))
    return outcome


def _check_expected(part: Part, records: Records) -> None:
    total = records.total
    if part.expected_records is not None and total != part.expected_records:
        raise UserError(
            f"{part.annotations}: expected_records is {part.expected_records}, but the annotations have"
            f" {total}; the file is another version or incomplete: fetch it again, or correct"
            " expected_records"
        )


def _malformed(part: Part, records: Records, outcome: Outcome) -> None:
    if records.malformed and part.policy.malformed == "fail":
        shown = "\n".join(f"  {m.file}, record {m.number}: {m.why}" for m in records.malformed[:20])
        raise UserError(
            f"{part.annotations}: {len(records.malformed)} malformed records:\n{shown}\n"
            "  fix the annotations, or say `malformed: drop` in the part's policy"
        )
    for bad in records.malformed:
        outcome.drop("malformed", {"record": f"{bad.file}, record {bad.number}", "detail": bad.why})


_PAST = {"fix": "fixed: ", "keep": "kept: ", "drop": "", "fail": ""}


def _findings(part: Part, records: Records, outcome: Outcome) -> None:
    """What is odd about the records themselves; their policy was applied when they were read."""
    failed = [refused for refused in records.refused if refused.action == "fail"]
    if failed:
        kinds = sorted({refused.kind for refused in failed})
        shown = "\n".join(
            f"  {r.example['record']} (id {r.example['id']!r}): {KINDS[r.kind].what}: {r.example['detail']}"
            for r in failed[:20]
        )
        choices = "; ".join(f"{kind}: {', '.join(KINDS[kind].actions)}" for kind in kinds)
        raise UserError(
            f"{part.annotations}: {len(failed)} records are {' or '.join(kinds)}, and the policy says"
            f" fail:\n{shown}\n  fix the annotations, or set `records: {{{kinds[0]}: ...}}` in the part's"
            f" policy ({choices})"
        )
    for refused in records.refused:
        outcome.drop(refused.kind, refused.example)
    for name, found in records.found.items():
        if found.action != "drop":
            outcome.examples[_PAST[found.action] + name] = found.examples


def _unmapped(part: Part, records: Records, join: Join) -> None:
    nowhere = np.flatnonzero(join.group < 0)
    if not len(nowhere):
        return
    names = records.images.take(nowhere[:1000]).to_pylist()
    heads = sorted({name.rsplit("/", 1)[0] if "/" in name else "" for name in names})
    raise UserError(
        f"{part.annotations}: {len(nowhere)} images, e.g. {names[0]!r}, begin with no prefix of the part; "
        f"add a mapping to `images` for: {', '.join(repr(head) for head in heads[:8])}"
    )


def _images(part: Part, records: Records, join: Join, stores: dict[str, Store], outcome: Outcome) -> None:
    bad = np.flatnonzero(join.status != "ok")
    owner = records.record_of_image[bad]
    actions = [_ACTIONS[getattr(part.policy, status)] for status in join.status[bad]]
    failed: list[tuple[int, int]] = []
    reasons: dict[int, int] = {}
    for image, record, action in zip(bad.tolist(), owner.tolist(), actions, strict=True):
        if action == FAIL:
            failed.append((image, record))
        elif action == DROP:
            reasons.setdefault(record, image)
        else:
            status = str(join.status[image])
            outcome.kept_damaged[status] = outcome.kept_damaged.get(status, 0) + 1
            if outcome.wants_example("kept: " + status):
                outcome._example("kept: " + status, _example(records, record, image, join, stores))
    if failed:
        raise UserError(_failure(part, records, failed, join, stores))
    for record, image in reasons.items():
        outcome.keep[record] = False
        status = str(join.status[image])
        wanted = outcome.wants_example(status)
        outcome.drop(status, _example(records, record, image, join, stores) if wanted else None)


def _seen_otherwise(records: Records, join: Join, stores: dict[str, Store], outcome: Outcome) -> None:
    """Counts whole pictures that training sees otherwise than viewers show them; they stay as they are."""
    owner = records.record_of_image
    for index, resolved in enumerate(join.resolved):
        notes = stores[resolved.source].note
        if notes is None:
            continue
        mine = np.flatnonzero((join.mapping == index) & (join.row >= 0) & outcome.keep[owner])
        for image in mine[notes[join.row[mine]] != ""].tolist():
            note = str(notes[join.row[image]])
            outcome.seen_otherwise[note] = outcome.seen_otherwise.get(note, 0) + 1
            if outcome.wants_example("kept: " + note):
                outcome._example("kept: " + note, _example(records, int(owner[image]), image, join, stores))


def _example(
    records: Records, record: int, image: int, join: Join, stores: dict[str, Store]
) -> dict[str, Any]:
    return {
        "record": records.where(record),
        "id": record_id(records, record),
        "image": records.images[image].as_py(),
        "detail": _detail(image, join, stores),
    }


def _detail(image: int, join: Join, stores: dict[str, Store]) -> str:
    if join.row[image] < 0:
        source = join.resolved[join.group[image]].source if join.group[image] >= 0 else "any source"
        return f"not in {source}"
    store = stores[join.resolved[join.mapping[image]].source]
    detail: str = store.table.column("detail")[int(join.row[image])].as_py()
    return f"{store.source}: {detail}"


def _failure(
    part: Part, records: Records, failed: Sequence[tuple[int, int]], join: Join, stores: dict[str, Store]
) -> str:
    kinds = sorted({str(join.status[image]) for image, _ in failed})
    lines = [f"{part.annotations}: {len(failed)} images are {' or '.join(kinds)}, and the policy says fail:"]
    for image, record in failed[:20]:
        item = _example(records, record, image, join, stores)
        lines.append(
            f"  {item['record']} (id {item['id']}): {item['image']} is {join.status[image]}: {item['detail']}"
        )
    lines.append(f"  fix the source, or set {', '.join(kinds)} to drop in the part's policy")
    return "\n".join(lines)


def _duplicates(part: Part, records: Records, outcome: Outcome) -> None:
    if part.policy.duplicate_ids == "keep":
        return
    _, first = np.unique(records.id_hash, return_index=True)
    again = np.ones(len(records), bool)
    again[first] = False
    again &= (records.id_hash != 0) & outcome.keep
    rows: list[int] = np.flatnonzero(again).tolist()
    if len(rows) and part.policy.duplicate_ids == "fail":
        shown = "\n".join(f"  {records.where(row)}: id {record_id(records, row)!r}" for row in rows[:20])
        raise UserError(
            f"{part.annotations}: {len(rows)} records have an id that came before:\n{shown}\n"
            "  fix the annotations, or set duplicate_ids to keep or drop in the part's policy"
        )
    for row in rows:
        wanted = outcome.wants_example("duplicate_id")
        example = {"record": records.where(row), "id": record_id(records, row), "detail": "id came before"}
        outcome.drop("duplicate_id", example if wanted else None)
    outcome.keep[rows] = False


def _too_many(part: Part, outcome: Outcome, dropped: int, total: int) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(outcome.dropped.items()))
    lines = [
        f"{part.annotations}: {dropped} of {total} records ({dropped / total:.2%}) would be dropped"
        f" ({reasons}), more than max_dropped_share {part.policy.max_dropped_share:g} allows"
    ]
    for reason, examples in outcome.examples.items():
        lines += [
            f"  {reason}: {item['record']}: {item.get('image', '')} {item['detail']}"
            for item in examples
            if reason in outcome.dropped
        ]
    lines.append("  fix the source (fetch it again?), or raise max_dropped_share in the part's policy")
    return "\n".join(lines)
