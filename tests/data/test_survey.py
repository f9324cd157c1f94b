"""A survey says of each sample what training gets; reading ahead changes no id."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llava_ext.data.assembly import Collator
from llava_ext.data.conversation import encode
from llava_ext.data.dataset import EncodedSamples
from llava_ext.data.read_ahead import ReadAhead
from llava_ext.data.samples import open_samples
from llava_ext.data.survey import CODES, MEASURED, REASONS, Surveyor
from llava_ext.data.templates import TEMPLATES, ConversationError
from llava_ext.model.folders import image_config, load_tokenizer
from llava_ext.model.interventions import Interventions
from tests.data.test_records import ODD
from tests.golden.test_text import record, records_of
from tests.support.models import picture
from tests.support.trainings import GOLDEN

ODD_TEXTS = ["", " ", "\n", "  two  ", "</s>", "a</s>b", "<unk>", "<image>", "é▁x", "a" * 300, "<s>"]


def outcome(sample, tokenizer, version, limit):
    try:
        return encode(sample, tokenizer, version, limit)
    except (ConversationError, ValueError, KeyError, AssertionError) as error:
        return str(error)


def samples():
    """All recorded conversations, odd records of every kind, and odd texts in every place."""
    found = [record(entry) for entry in records_of(GOLDEN).values()]
    found += [odd for _, odd, _ in ODD]
    for text in ODD_TEXTS:
        for turns in ((text, "an answer"), ("a question", text)):
            pair = [{"from": who, "value": value} for who, value in zip(("human", "gpt"), turns, strict=True)]
            found += [{"conversations": pair}, {"conversations": pair * 2, "image": "a.png"}]
    return found


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_alt"])
@pytest.mark.parametrize("version", TEMPLATES)
@pytest.mark.parametrize("limit", [20, 2048])
def test_texts_that_are_ready_give_the_same_encoding(name, version, limit):
    tokenizer = load_tokenizer(GOLDEN / name, limit)
    if version == "chat":
        tokenizer.chat_template = (
            "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n"
            "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
        )
    ahead, every = ReadAhead(tokenizer, version, limit), samples()
    ahead.look_at(every)
    for sample in every:
        assert outcome(sample, ahead.tokenizer, version, limit) == outcome(sample, tokenizer, version, limit)


def test_a_text_that_was_not_foreseen_is_tokenised_when_it_is_asked_for():
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    ahead, every = ReadAhead(tokenizer, "v1", 2048), samples()
    ahead.look_at(every[:3])
    for sample in every:
        assert outcome(sample, ahead.tokenizer, "v1", 2048) == outcome(sample, tokenizer, "v1", 2048)


LAYOUTS = [{}, {"compression_after_projection": True, "final_spatial_size": 4}, {"interleave": True}]


def surveyor(store, version="v1", limit=2048, layouts=LAYOUTS):
    tokenizer = load_tokenizer(GOLDEN / "llm", limit)
    configs = [image_config(GOLDEN / "clip_g4", Interventions(**flags), False) for flags in layouts]
    collators = [Collator.for_model(config, tokenizer, model_max_length=limit) for config in configs]
    return Surveyor(store, tokenizer, version, limit, collators)


@pytest.mark.parametrize(
    ("stage", "version", "limit"), [(1, "plain", 2048), (1, "plain", 22), (2, "v1", 2048), (2, "v1", 60)]
)
def test_tokens_and_labels_are_those_of_trainings_own_batches(stage, version, limit):
    """Each sample as the dataset and the collator hand it to the model, pixels and all."""
    store = open_samples(GOLDEN / f"train/stage{stage}.json", GOLDEN / "images")
    looking = surveyor(store, version, limit)
    rows = looking.measure(range(len(store))).rows
    tokenizer = load_tokenizer(GOLDEN / "llm", limit)
    pixels = EncodedSamples(store, tokenizer, version, limit, lambda data, tolerant: _pixels())
    whole = [collator.block.count(collator.image_token_id) for collator in looking.collators]
    for layout, collator in enumerate(looking.collators):
        for index in range(len(store)):
            batch, row = collator([pixels[index]]), rows[layout, index]
            assert row["tokens"] == batch["input_ids"].shape[1]
            assert row["labels"] == int((batch["labels"][:, 1:] != -100).sum())
            kept = batch.get("image_token_counts", np.zeros(0)).tolist()
            assert row["vision"] == int((batch["input_ids"] == collator.image_token_id).sum())
            cut = row["pictures"] - sum(count == whole[layout] for count in kept)
            assert row["pictures_cut"] == cut
    assert (rows["reason"] == CODES["labelled"]).any()
    assert rows["is_cut"].any() == (limit < 2048)


def _pixels():
    import torch

    return torch.zeros(3, picture(0).height, picture(0).height)


def write(folder, *pairs, **more):
    records = [
        {"id": f"r{n}", "conversations": [{"from": who, "value": value} for who, value in turns], **more}
        for n, turns in enumerate(pairs)
    ]
    (folder / "mine.json").write_text(json.dumps(records))
    return open_samples(folder / "mine.json", folder)


def talk(question, answer):
    return ("human", question), ("gpt", answer)


def reasons(rows):
    names = list(REASONS)
    return [names[code] for code in rows[0]["reason"]]


def test_why_a_sample_has_no_label(tmp_path):
    store = write(
        tmp_path,
        talk("Why?", "Because."),
        talk("Why?", "First</s>then."),
        talk("Why?", ""),
        talk("word " * 200, "Because."),
    )
    found = surveyor(store, limit=100).measure(range(4))
    assert reasons(found.rows) == ["labelled", "end_in_text", "mismatch", "cut_away"]
    assert found.rows[0]["is_cut"].tolist() == [False, False, False, True]
    found = surveyor(store, "plain").measure(range(4))
    assert set(reasons(found.rows)) == {"refused"} and len(found.refused) == 4
    assert "record 2 (id 'r1'" in found.refused[1] and "`plain` needs two turns" in found.refused[1]


def test_a_text_that_just_fits_is_not_cut(tmp_path):
    store = write(tmp_path, talk("Why?", "Because."))
    length = int(surveyor(store).measure(range(1)).rows[0, 0]["tokens"])
    for limit, is_cut in ((length, False), (length - 1, True)):
        row = surveyor(store, limit=limit).measure(range(1)).rows[0, 0]
        assert (row["tokens"], row["is_cut"]) == (limit, is_cut)


def test_the_table_is_small():
    assert MEASURED.itemsize == 16
