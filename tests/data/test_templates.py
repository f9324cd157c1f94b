"""Prompt templates: ids as the tokenizer's own template gives them, labels on what the assistant writes,
several pictures.
"""

from __future__ import annotations

import pytest
from tokenizers import processors

from llava_ext.data.chat import chat_of
from llava_ext.data.conversation import (
    check_template,
    encode,
    end_ids,
    inference_ids,
    inference_prompt,
    require_pictures,
)
from llava_ext.data.image_token import image_token_id, with_image_token
from llava_ext.data.templates import TEMPLATES, ConversationError, described, template
from llava_ext.model.folders import load_tokenizer
from tests.support import chat_templates
from tests.support.chat_templates import CHATML, FAMILIES, MISTRAL_LAST
from tests.support.models import LLM

END = {"qwen": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>"}
DATE = "26 Jul 2024"  # where the clock of a template stands


def said(*values: str, system: str | None = None, image: object = None) -> dict:
    """A record whose turns alternate, human first."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    if system is not None:
        turns.insert(0, {"from": "system", "value": system})
    return {"id": "x", "conversations": turns} | ({"image": image} if image else {})


def messages(record: dict) -> list[dict]:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]


def of_tokenizer(tokenizer, record: dict) -> list[int]:
    """What the tokenizer itself makes of the conversation, `<image>` being one special token."""
    extended = with_image_token(tokenizer)
    found = extended.apply_chat_template(messages(record), tokenize=True, return_dict=True, date_string=DATE)
    image = image_token_id(tokenizer)
    return [-200 if token == image else token for token in found["input_ids"]]


CONVERSATIONS = {
    "one round": said("What is it?", "A star."),
    "three rounds": said("What is it?", "A star.", "And the other one?", "A square.", "Sure?", "Yes."),
    "a system turn": said("What is it?", "A star.", "Sure?", "Yes.", system="Answer shortly."),
    "spaces around": said("  What is it? \n", " A star.\n\n", "\n\nSure?", "\n Yes. "),
    "the end token in a question": said("What is <|im_end|> and </s>?", "A token.", "Sure?", "Yes."),
    "other alphabets": said("Qu'est-ce que c'est ? 🔴", "Ünïcode ★ 星 é", "ok", "👍🏽"),
    "an empty answer": said("What is it?", "", "Sure?", "Yes."),
    "a picture": said("<image>\nWhat is it?", "A star.", "Sure?", "Yes.", image="a.png"),
    "a picture alone": said("<image>", "A star.", image="a.png"),
    "two pictures": said(
        "Is <image> like\n<image>?", "No.", "<image> and this?", "Yes.", image=["a", "b", "c"]
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_apply_chat_template(family, name):
    tokenizer, record = FAMILIES[family](), CONVERSATIONS[name]
    encoded = encode(record, tokenizer, "chat", 2048)
    assert encoded.input_ids == of_tokenizer(tokenizer, record)
    image = record.get("image", [])
    assert encoded.input_ids.count(-200) == (1 if isinstance(image, str) else len(image))
    assert not encoded.mismatch


def labelled(tokenizer, encoded) -> list[str]:
    """The runs of labelled tokens, as text."""
    runs: list[list[int]] = [[]]
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (-100, token)
        if label == -100:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if name != "spaces around"])
def test_labels_are_on_the_answers_and_what_ends_them(family, name):
    """Where the model begins to write differs by family: Mistral's writes a space first, Qwen 3's its
    empty thoughts.
    """
    tokenizer, record, end = FAMILIES[family](), CONVERSATIONS[name], END[family]
    answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
    expected = [f"{' ' if family == 'mistral' else ''}{answer}{end}" for answer in answers]
    if family == "qwen3":
        expected[-1] = f"<think>\n\n</think>\n\n{expected[-1]}"
    assert labelled(tokenizer, encode(record, tokenizer, "chat", 2048)) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_spaces_around_an_answer_are_labelled_as_the_template_keeps_them(family):
    tokenizer, record = FAMILIES[family](), CONVERSATIONS["spaces around"]
    trimmed = {"llama3": ["A star.", "Yes."], "qwen3": [" A star.\n\n", "<think>\n\n</think>\n\n Yes. "]}
    kept = trimmed.get(family, [" A star.\n\n", "\n Yes. "])
    lead = " " if family == "mistral" else ""
    found = labelled(tokenizer, encode(record, tokenizer, "chat", 2048))
    # A space may be one token with what stands before it, in the prompt.
    assert [text.lstrip() for text in found] == [f"{lead}{text}{END[family]}".lstrip() for text in kept]


def test_labels_equal_the_mask_of_a_template_that_marks_its_answers():
    marked = CHATML.replace(
        "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}",
        "{{- '<|im_start|>' + message['role'] + '\\n' }}{%- if message['role'] == 'assistant' %}"
        "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}"
        "{%- else %}{{- message['content'] + '<|im_end|>\\n' }}{%- endif %}",
    )
    tokenizer = chat_templates.qwen(marked)
    # transformers' mask loses spaces whose place in the text the tokenizer has cut off.
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for record in CONVERSATIONS.values():
        if "image" in record:
            continue
        theirs = tokenizer.apply_chat_template(
            messages(record), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        labels = encode(record, tokenizer, "chat", 2048).labels
        assert [int(label != -100) for label in labels] == theirs["assistant_masks"]


def test_with_llamas_own_tokenizer():
    """Sentencepiece's marks: the ids around a picture are those of the tokenizer, and so are the labels."""
    tokenizer = load_tokenizer(LLM)
    tokenizer.chat_template = chat_templates.MISTRAL
    for record in CONVERSATIONS.values():
        encoded = encode(record, tokenizer, "chat", 2048)
        assert encoded.input_ids == of_tokenizer(tokenizer, record)
        answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
        assert len(labelled(tokenizer, encoded)) == len(answers)
    assert labelled(tokenizer, encode(CONVERSATIONS["a picture"], tokenizer, "chat", 99)) == [
        "A star.</s>",
        "Yes.</s>",
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_for_inference_is_the_beginning_of_what_training_saw(family):
    tokenizer = FAMILIES[family]()
    trained = encode(said("<image>\nWhat is it?", "A star.", image="a.png"), tokenizer, "chat", 2048)
    prompt = inference_prompt("What is it?", "chat", True, tokenizer)
    ids = inference_ids(tokenizer, prompt, "chat", True)
    assert trained.input_ids[: len(ids)] == ids
    assert trained.labels[: len(ids)] == [-100] * len(ids) and trained.labels[len(ids)] != -100
    assert end_ids(tokenizer, "chat") == [tokenizer.convert_tokens_to_ids(END[family])]
    assert trained.labels[-1 if family in ("llama3", "mistral") else -2] == end_ids(tokenizer, "chat")[0]


def test_the_word_image_without_a_picture_is_text():
    tokenizer = chat_templates.qwen()
    encoded = encode(said("What does <image> mean?", "A place."), tokenizer, "chat", 2048)
    assert -200 not in encoded.input_ids and image_token_id(tokenizer) not in encoded.input_ids
    assert "What does <image> mean?" in tokenizer.decode(encoded.input_ids)


def test_texts_are_cut_and_pictures_are_left_to_the_collator():
    tokenizer = chat_templates.qwen()
    text = encode(CONVERSATIONS["three rounds"], tokenizer, "chat", 20)
    assert len(text.input_ids) == len(text.labels) == 20
    assert len(encode(CONVERSATIONS["a picture"], tokenizer, "chat", 20).input_ids) > 20


# -- templates that can't be used -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (CHATML.replace("+ '<|im_end|>' + '\\n' }}", "+ '\\n' }}"), "no special token behind an answer"),
        (
            CHATML.replace("messages %}", "messages[-2:] %}"),
            "writes the beginning of the conversation otherwise",
        ),
        (CHATML.replace("message['content']", "message['content'].upper()"), "changes the words"),
        (
            CHATML.replace("message['content']", "(message['content'] | replace('<image>', ''))"),
            "wrote 0 <image>",
        ),
        (CHATML + "{{- raise_exception('never') }}", "refuses it: never"),
        ("<|endoftext|>" + CHATML, "padding token"),
    ],
)
def test_a_template_that_cant_be_learnt_is_refused_before_training(broken, words):
    with pytest.raises(ConversationError, match=words):
        check_template("chat", chat_templates.qwen(broken))


def test_a_tokenizer_without_template_is_refused():
    with pytest.raises(ConversationError, match=r"has no chat template; put its chat_template\.jinja"):
        check_template("chat", load_tokenizer(LLM))


def test_a_system_text_that_moves_to_the_last_question_is_refused_where_it_moves():
    tokenizer = chat_templates.mistral(MISTRAL_LAST)
    encode(said("What is it?", "A star.", system="Be short."), tokenizer, "chat", 2048)
    encode(CONVERSATIONS["three rounds"], tokenizer, "chat", 2048)
    with pytest.raises(
        ConversationError, match=r"turn 2: .* writes the beginning of the conversation otherwise"
    ):
        encode(CONVERSATIONS["a system turn"], tokenizer, "chat", 2048)


def test_an_unknown_template_is_refused_with_the_list():
    with pytest.raises(ConversationError, match="found 'v2'; allowed are chat, plain, v1"):
        template("v2")
    assert all(name in described() for name in TEMPLATES)


# -- system turns and roles -------------------------------------------------------------------------------


def test_a_system_turn_replaces_the_text_of_v1():
    tokenizer = load_tokenizer(LLM)
    plain, own = said("What is it?", "A star."), said("What is it?", "A star.", system="Be short.")
    usual = encode(plain, tokenizer, "v1", 2048)
    assert tokenizer.decode(usual.input_ids).startswith("<s> A chat between a curious user")
    changed = encode(own, tokenizer, "v1", 2048)
    assert tokenizer.decode(changed.input_ids) == "<s> Be short. USER: What is it? ASSISTANT: A star.</s>"
    assert not changed.mismatch and [label for label in changed.labels if label != -100] == [
        label for label in usual.labels if label != -100
    ]
    assert tokenizer.decode(encode(said("a", "b", system=""), tokenizer, "v1", 99).input_ids).startswith(
        "<s> USER:"
    )


@pytest.mark.parametrize("version", ["v1", "chat"])
@pytest.mark.parametrize(
    ("turns", "words"),
    [
        (
            [("human", "a"), ("system", "b"), ("gpt", "c")],
            "turn 1: unknown role 'system'; allowed are human and gpt",
        ),
        ([("system", "s"), ("human", "a"), ("tool", "c")], "turn 2: unknown role 'tool'"),
        ([("human", "a"), ("human", "b")], "turn 1: found 'human'; human and gpt must alternate"),
        ([("system", "s"), ("human", "a"), ("human", "b")], "turn 2: found 'human'"),
        ([("system", "s")], "a system turn alone"),
    ],
)
def test_turns_that_are_no_conversation_are_named(version, turns, words):
    record = {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}
    with pytest.raises(ConversationError, match=words):
        encode(record, chat_templates.qwen(), version, 2048)


# -- pictures ---------------------------------------------------------------------------------------------


def test_one_picture_leads_its_turn_as_llavas():
    tokenizer = load_tokenizer(LLM)
    wanted = encode(said("<image>\nWhat is it?", "A star.", image="a.png"), tokenizer, "v1", 2048)
    for question in ("What is it?\n<image>", "What <image>is it?", "<image><image>What is it?"):
        for image in ("a.png", ["a.png"]):
            assert encode(said(question, "A star.", image=image), tokenizer, "v1", 2048) == wanted


@pytest.mark.parametrize("version", ["v1", "chat"])
def test_several_pictures_stay_where_they_are(version):
    tokenizer = chat_templates.qwen() if version == "chat" else load_tokenizer(LLM)
    record = said("Is <image> like <image>?", "No.", "And <image>?", "Yes.", image=["a", "b", "c"])
    encoded = encode(record, tokenizer, version, 2048)
    pieces, run = [], []
    for token in [*encoded.input_ids, -200]:
        if token == -200:
            pieces.append(tokenizer.decode(run))
            run = []
        else:
            run.append(token)
    assert [piece.split()[-1] for piece in pieces[:3]] == ["Is", "like", "And"] and len(pieces) == 4
    assert any(label != -100 for label in encoded.labels) and not encoded.mismatch


def test_several_pictures_and_a_caption():
    tokenizer = load_tokenizer(LLM)
    ids = encode(
        said("<image>\n<image>\nDescribe.", "Two stars.", image=["a", "b"]), tokenizer, "plain", 2048
    )
    one = encode(said("<image>\nDescribe.", "Two stars.", image="a"), tokenizer, "plain", 2048)
    assert ids.input_ids == [one.input_ids[0], -200, *one.input_ids[1:]]
    assert ids.labels == [-100, *one.labels]


@pytest.mark.parametrize("version", ["v1", "plain", "chat"])
def test_pictures_and_placeholders_that_do_not_agree_are_counted(version):
    tokenizer = chat_templates.qwen()
    with pytest.raises(ConversationError, match=r"1 <image> \(turn 0 \(human\)\) for 2 pictures"):
        encode(said("<image>\nWhat?", "A star.", image=["a", "b"]), tokenizer, version, 2048)
    with pytest.raises(
        ConversationError, match=r"2 <image> \(turn 0 \(human\), turn 1 \(gpt\)\) for 3 pictures"
    ):
        encode(said("<image>\nWhat?", "A <image>.", image=["a", "b", "c"]), tokenizer, version, 2048)
    too_many = said("<image>\nWhat?", "A <image>.", image="a")
    with pytest.raises(
        ConversationError, match=r"2 <image> \(turn 0 \(human\), turn 1 \(gpt\)\) for 1 picture;"
    ):
        require_pictures(too_many, encode(too_many, tokenizer, version, 2048))


def test_the_template_of_a_tokenizer_is_made_ready_once():
    tokenizer = chat_templates.qwen()
    assert chat_of(tokenizer) is chat_of(tokenizer)
