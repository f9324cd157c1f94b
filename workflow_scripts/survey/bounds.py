"""Which shares of a survey stop the workflow, and what is said then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llava_ext.data.survey import REASONS

MASKED = ("mismatch", "end_in_text")


def problems(facts: Mapping[str, Any], use: Mapping[str, Any], mixture: str) -> Iterator[str]:
    """What is out of bounds, a paragraph each: source, numbers, key of the configuration, examples, fix.

    Args:
        facts: of a layout, as :func:`workflow_scripts.survey.facts.facts_of` gives them.
        use: the stage, its ``model_max_length`` and its ``bounds``.
    """
    yield from _refused(facts, mixture)
    for source, found in facts["sources"].items():
        examples = facts["examples"].get(source, {})
        yield from _without_labels(source, found, examples, use)
    yield from _cut(facts, use)
    yield from _supervised(facts["all"], use)


def _refused(facts: Mapping[str, Any], mixture: str) -> Iterator[str]:
    for source, found in facts["sources"].items():
        if number := found["unlabelled"].get("refused", 0):
            yield (
                f"source {source}: {_of(number, found)} can't be encoded, and a training would stop at the"
                f" first of them{_named(facts['examples'][source]['refused'])}\n    Mend the records, drop"
                f" them by a policy (mixtures.{mixture}.parts, policy.records), leave them out"
                f" (mixtures.{mixture}.skip_samples), or choose another prompt_version."
            )


def _without_labels(
    source: str, found: Mapping[str, Any], examples: Mapping[str, Any], use: Mapping[str, Any]
) -> Iterator[str]:
    cut = [name for name in found["unlabelled"] if name not in (*MASKED, "refused")]
    length = use["model_max_length"]
    for name, reasons, what, fix in (
        (
            "max_mismatch_share",
            MASKED,
            "are masked whole",
            "Use the prompt_version that fits the tokenizer, take what ends an answer out of the texts, or"
            " allow more.",
        ),
        (
            "survey.max_unlabelled_share",
            cut,
            f"have no label after the cut at model_max_length {length}",
            "Raise model_max_length, shorten or drop the records, or allow more.",
        ),
    ):
        numbers = {reason: found["unlabelled"].get(reason, 0) for reason in reasons}
        key, allowed = _bound(use, name)
        if sum(numbers.values()) > allowed * found["samples"]:
            named = [item for reason in numbers for item in examples.get(reason, [])]
            yield (
                f"source {source}: {_of(sum(numbers.values()), found)} {what} ({_reasons(numbers)});"
                f" allowed by {key}: {allowed:.1%}{_named(named)}\n    {fix}"
            )


def _cut(facts: Mapping[str, Any], use: Mapping[str, Any]) -> Iterator[str]:
    for kind, what, name in (
        ("cut", "are cut", "survey.max_cut_share"),
        ("picture_cut", "lose tokens of a picture by the cut", "survey.max_picture_cut_share"),
    ):
        found, (key, allowed) = facts["all"], _bound(use, name)
        if found[kind] > allowed * found["samples"]:
            shares = ", ".join(
                f"{source} {numbers[kind] / numbers['samples']:.1%}"
                for source, numbers in facts["sources"].items()
                if numbers[kind]
            )
            named = [item for examples in facts["examples"].values() for item in examples.get(kind, [])]
            yield (
                f"{_of(found[kind], found)} {what} at model_max_length {use['model_max_length']} (of its"
                f" sources: {shares}); allowed by {key}: {allowed:.1%}{_named(named)}\n    Raise"
                " model_max_length, split or drop long records, or allow more."
            )


def _supervised(found: Mapping[str, Any], use: Mapping[str, Any]) -> Iterator[str]:
    (key, least), text = _bound(use, "min_supervised_share"), found["tokens"] - found["vision"]
    if text and found["labels"] < least * text:
        yield (
            f"only {found['labels']} of {text} tokens of text carry a label ({found['labels'] / text:.2%});"
            f" {key} asks for {least:.2%}\n    Check prompt_version and model_max_length, or allow less."
        )


def _bound(use: Mapping[str, Any], name: str) -> tuple[str, float]:
    return f"stages.{use['stage']}.{name}", float(use["bounds"][name.rpartition(".")[2]])


def _of(number: int, found: Mapping[str, Any]) -> str:
    return f"{number} of {found['samples']} samples ({number / found['samples']:.2%})"


def _reasons(numbers: Mapping[str, int]) -> str:
    return "; ".join(f"{number}: {REASONS[name]}" for name, number in numbers.items() if number)


def _named(examples: list[dict[str, Any]], most: int = 5) -> str:
    lines = [
        f"\n    {item['file']}, record {item['record']} (id {item['id']!r}, source {item['source']},"
        f" {item['image'] or 'no image'})" + (f": {item['said']}" if item.get("said") else "")
        for item in examples[:most]
    ]
    return ", for example" + "".join(lines) if lines else ""
