"""Token ids, labels and mismatch flags of every recorded conversation, prompt and batch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from llava_ext.data import conversation, templates
from llava_ext.data.assembly import coordinate_ids, published_coordinate_ids
from llava_ext.data.image_token import MARK
from llava_ext.model.folders import load_tokenizer

from . import reference

COORDINATE_GRID = 24  # the published code's fixed grid
# The original has no system turns and stops; here one replaces the template's system text.
OTHERWISE = {"system_role"}


@cache
def tokenizer_of(root: Path, name: str, max_length: int = 2048):
    return load_tokenizer(root / name, max_length)


def conversation_files(root: Path) -> list[str]:
    """Files of encoded conversations: `<version>_...` with a `max...` in the name."""
    return sorted(
        path.name
        for path in (root / "text").glob("*.json")
        if path.stem.split("_")[0] in templates.TEMPLATES
        and "_" in path.stem
        and path.stem != "plain_conversations"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = reference.folder(metafunc.config)
    if "conversations" in metafunc.fixturenames:
        metafunc.parametrize("conversations", conversation_files(root))


def records_of(root: Path) -> dict[str, dict]:
    """Raw conversations by id, of all files that have them."""
    found = {}
    for name in ("conversations.json", "plain_conversations.json"):
        for entry in reference.read(root / "text" / name):
            found[entry["id"]] = entry
    return found


def record(entry: dict) -> dict:
    turns = entry.get("conversations") or entry.get("conversation")
    return {"id": entry["id"], "conversations": turns} | ({"image": "an.png"} if entry["has_image"] else {})


def test_every_conversation_has_the_recorded_ids_labels_and_mismatch(root, conversations, report_difference):
    version = conversations.split("_")[0]
    tokenizer_name = "tokenizer_alt" if "alt_tokenizer" in conversations else "tokenizer"
    raw, wrong, entries = records_of(root), [], reference.read(root / "text" / conversations)
    for entry in entries:
        tokenizer = tokenizer_of(root, tokenizer_name, entry["model_max_length"])
        sample = record(raw[entry["id"]])
        if version == "v1" and entry["id"] in OTHERWISE:
            continue
        if entry["exception"]:
            with pytest.raises(templates.ConversationError):
                conversation.encode(sample, tokenizer, version, entry["model_max_length"])
            continue
        encoded = conversation.encode(sample, tokenizer, version, entry["model_max_length"])
        expected = (entry["input_ids"], entry["labels"], bool(entry["mismatch"]))
        if (encoded.input_ids, encoded.labels, encoded.mismatch) != expected:
            wrong.append(entry["id"])
    assert entries
    report_difference(f"text/{conversations}: conversations that differ", len(wrong), 0)


def test_single_strings(root, report_difference):
    tokenizer = tokenizer_of(root, "tokenizer")
    entries = reference.read(root / "text" / "raw_tokenizer.json")
    wrong = [
        entry["text"]
        for entry in entries
        if conversation.text_ids(tokenizer, entry["text"]) != entry["slow_ids"]
    ]
    assert entries
    report_difference("text/raw_tokenizer.json: strings that differ", len(wrong), 0)


def test_prompts_with_images(root, report_difference):
    tokenizer = tokenizer_of(root, "tokenizer")
    entries = reference.read(root / "text" / "prompts_tokenizer_image_token.json")
    wrong = [
        entry["prompt"]
        for entry in entries
        if conversation.prompt_ids(tokenizer, entry["prompt"]) != entry["input_ids"]
    ]
    assert entries
    report_difference("text/prompts: prompts that differ", len(wrong), 0)


def test_the_inference_prompt(root):
    recorded = reference.read(root / "text" / "templates.json")["v1"]
    question = (
        recorded["inference_prompt"].partition("<image>\n")[2].partition(f" {recorded['roles'][1]}:")[0]
    )
    prompt = conversation.inference_prompt(question, "v1", has_image=True)
    assert prompt == recorded["inference_prompt"]
    assert conversation.prompt_ids(tokenizer_of(root, "tokenizer"), prompt) == recorded["inference_ids"]


def test_coordinate_tokens(root, report_difference):
    tokenizer = tokenizer_of(root, "tokenizer")
    rows = reference.read(root / "text" / "coordinate_tokens.json")["rows"]
    published = wrong = 0
    for entry in rows:
        row, column = divmod(entry["patch_idx"], COORDINATE_GRID)
        assert entry["text"] == f"{row},{column}"
        published += published_coordinate_ids(tokenizer, row, column) != entry["ids_after_slice"]
        # Ours are the ids of the bare text; equal wherever the token that the published code drops is the
        # lone word mark.
        if tokenizer.convert_ids_to_tokens(entry["ids"][0]) == MARK:
            wrong += coordinate_ids(tokenizer, row, column) != entry["ids_after_slice"]
    report_difference("text/coordinate_tokens.json: published behaviour", published, 0)
    report_difference("text/coordinate_tokens.json: bare text", wrong, 0)


def test_collated_batches(root, report_difference):
    """The reference pads, then cuts, and masks by id 0; the same ids are what our collator starts from."""
    raw, wrong = records_of(root), []
    for name, batch in reference.read(root / "text" / "collator.json").items():
        limit = int(name.split("_")[0].removeprefix("max"))
        tokenizer = tokenizer_of(root, "tokenizer", limit)
        rows = [conversation.encode(record(raw[key]), tokenizer, "v1", limit) for key in batch["ids"]]
        for row, ids, labels, mask in zip(
            rows, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
        ):
            kept, filler = row.input_ids[:limit], len(ids) - len(row.input_ids[:limit])
            same = (
                kept + [tokenizer.pad_token_id] * filler == ids
                and row.labels[:limit] + [-100] * filler == labels
            )
            if not same or [token != tokenizer.pad_token_id for token in ids] != [
                bool(value) for value in mask
            ]:
                wrong.append(name)
    report_difference("text/collator.json: rows that differ", len(wrong), 0)


def test_lengths_for_grouping_count_words(root):
    """`modality_lengths` of the dataset: the words of all turns, negative without an image."""
    raw = records_of(root)
    for entry in reference.read(root / "text" / "dataset_lengths.json"):
        sample = record(raw[entry["id"]])
        words = sum(len(turn["value"].split()) for turn in sample["conversations"])
        assert entry["modality_length"] == (words if "image" in sample else -words)


def test_chat_template_gives_the_ids_of_training(root):
    """transformers' own path (chat template, `<image>` as a token) and ours agree on single-image
    dialogues.
    """
    from jinja2 import Environment

    from llava_ext.data.image_token import image_token_id, with_marked_images

    tokenizer = tokenizer_of(root, "tokenizer")
    extended, placeholder = with_marked_images(tokenizer, "<image>"), image_token_id(tokenizer)
    template = Environment().from_string(templates.dialogue_jinja(templates.TEMPLATES["v1"]))
    checked = 0
    longest = max(name for name in conversation_files(root) if name.startswith("v1_max"))
    for entry in reference.read(root / "text" / longest):
        turns = entry["turns_after_preprocess_multimodal"]
        if entry["exception"] or entry["mismatch"] or not entry["has_image"] or turns[0]["from"] != "human":
            continue
        roles = {"human": "user", "gpt": "assistant"}
        messages = []
        for turn in turns:
            has_image = turn["value"].startswith("<image>")
            text = turn["value"].removeprefix("<image>").removeprefix("\n") if has_image else turn["value"]
            image = [{"type": "image"}] if has_image else []
            messages.append(
                {"role": roles[turn["from"]], "content": [*image, {"type": "text", "text": text}]}
            )
        if any(
            part.get("text", "").startswith((" ", "▁")) or "▁" in part.get("text", "")
            for m in messages
            for part in m["content"]
        ):
            continue  # a chunk that starts with a space is another rule, tested above
        ids = extended(template.render(messages=messages))["input_ids"]
        assert ids == [placeholder if token == -200 else token for token in entry["input_ids"]], entry["id"]
        checked += 1
    assert checked >= 3
