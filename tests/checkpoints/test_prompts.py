"""A checkpoint's prompts are those of training, whatever the client: stock processors, text typed by hand,
pipelines, ours.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaForConditionalGeneration,
    pipeline,
)

from llava_ext.checkpoints.generation import REPAIRED, exported_generation
from llava_ext.checkpoints.stored import load_model, make_processor, save_checkpoint
from llava_ext.convert import convert
from llava_ext.data.assembly import Collator
from llava_ext.data.conversation import encode, end_ids, inference_ids, inference_prompt
from llava_ext.data.dataset import EncodedSamples
from llava_ext.data.images import ImagePreprocessor, decode
from llava_ext.data.samples import SamplesError, open_samples
from llava_ext.errors import TrainingError
from llava_ext.model.folders import load_tokenizer
from tests.support import chat_templates
from tests.support.models import LLM, TOWER, flags, make_model, picture

QUESTION = "What color is the circle?"
VARIANTS = {
    "vanilla": None,
    "compressed": ("compression_after_projection",),
    "coordinates": ("interleave",),
}


def with_template(tokenizer, version: str):
    """Llama's tokenizer with Mistral's chat template, whose turns it can tell apart."""
    if version == "chat":
        tokenizer.chat_template = chat_templates.MISTRAL
    return tokenizer


@pytest.fixture(
    scope="module", params=[(name, version) for name in VARIANTS for version in ("v1", "chat")], ids=str
)
def saved(request, tmp_path_factory):
    """(processor of the saved checkpoint, tokenizer and model of the training, version)"""
    name, version = request.param
    chosen = VARIANTS[name]
    model, tokenizer, images = make_model(flags(*chosen) if chosen else None, image_aspect_ratio="pad")
    with_template(tokenizer, version)
    model.config.prompt_version = version
    folder = tmp_path_factory.mktemp(f"{name}-{version}")
    make_processor(model.config, tokenizer, images).save_pretrained(folder)
    kind = AutoProcessor if chosen is None else type(make_processor(model.config, tokenizer, images))
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    return kind.from_pretrained(folder), tokenizer, model, version


def of_training(tokenizer, model, version: str, pictures: int, turns) -> list[int]:
    """Ids of a whole conversation as training's collator makes them."""
    record = {"image": ["a.png"] * pictures, "conversations": turns}
    encoded = encode(record, tokenizer, version, 2048)
    images = [torch.zeros(3, 56, 56)] * pictures
    sample = {"input_ids": encoded.input_ids, "labels": encoded.labels, "images": images}
    return Collator.for_model(model.config, tokenizer).assemble(sample).input_ids


def asked(tokenizer, model, version: str, question: str = QUESTION) -> list[int]:
    """Ids of a question as training has them up to the answer."""
    ids = inference_ids(tokenizer, inference_prompt(question, version, True, tokenizer), version, True)
    sample = {"input_ids": ids, "labels": ids, "images": [torch.zeros(3, 56, 56)]}
    return Collator.for_model(model.config, tokenizer).assemble(sample).input_ids


CONTENTS = {
    "parts": [{"type": "image"}, {"type": "text", "text": QUESTION}],
    "parts, the picture last": [{"type": "text", "text": QUESTION}, {"type": "image"}],
    "text": f"<image>\n{QUESTION}",
    "text without line break": f"<image>{QUESTION}",
    "text, the picture last": f"{QUESTION}\n<image>",
}


@pytest.mark.parametrize("content", CONTENTS)
def test_chat_messages(saved, content):
    processor, tokenizer, model, version = saved
    text = processor.apply_chat_template(
        [{"role": "user", "content": CONTENTS[content]}], add_generation_prompt=True
    )
    ids = processor(images=picture(0), text=text)["input_ids"][0]
    assert list(ids) == asked(tokenizer, model, version)


def test_chat_messages_tokenised_at_once_and_batched(saved):
    processor, tokenizer, model, version = saved
    part = {"type": "image", "image": picture(0)}
    chats = [
        [{"role": "user", "content": [part, {"type": "text", "text": text}]}] for text in (QUESTION, "Where?")
    ]
    batch = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs={"padding": True}
    )
    for ids, mask, text in zip(
        batch["input_ids"], batch["attention_mask"], (QUESTION, "Where?"), strict=True
    ):
        kept = [token for token, real in zip(ids, mask, strict=True) if real]
        assert kept == asked(tokenizer, model, version, text)


def test_text_typed_by_hand(saved):
    processor, tokenizer, model, version = saved
    typed = inference_prompt(QUESTION, version, True, tokenizer)
    assert f"<image>\n{QUESTION}" in typed
    assert list(processor(images=picture(0), text=typed)["input_ids"][0]) == asked(tokenizer, model, version)


def test_a_whole_conversation_with_a_system_turn_and_several_pictures(saved):
    processor, tokenizer, model, version = saved
    values = [
        ("system", "Be short."),
        ("human", "Is <image> like <image>?"),
        ("gpt", "No."),
        ("human", "Why?"),
        ("gpt", "One is red."),
    ]
    turns = [{"from": speaker, "value": value} for speaker, value in values]
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    text = processor.apply_chat_template([{"role": roles[s], "content": v} for s, v in values])
    ids = processor(images=[picture(0), picture(1)], text=text)["input_ids"][0]
    assert list(ids) == of_training(tokenizer, model, version, 2, turns)


def test_pictures_as_parts_before_the_text_stand_on_lines_of_their_own(saved):
    processor, tokenizer, model, version = saved
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}, {"role": "assistant", "content": "Both."}]
    )
    turns = [{"from": "human", "value": "<image>\n<image>\nWhich?"}, {"from": "gpt", "value": "Both."}]
    ids = processor(images=[picture(0), picture(1)], text=text)["input_ids"][0]
    assert list(ids) == of_training(tokenizer, model, version, 2, turns)


def test_a_role_that_v1_lacks_is_refused(saved):
    processor, _, _, version = saved
    if version == "v1":
        with pytest.raises(Exception, match="allowed roles are user and assistant"):
            processor.apply_chat_template(
                [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]
            )


@pytest.mark.parametrize("family", chat_templates.FAMILIES)
def test_every_familys_processor_has_the_ids_of_training(family, tmp_path):
    """Also Llama 3's, whose tokenizer would add a second first token, and whose template has today's date."""
    model, _, images = make_model(image_aspect_ratio="pad")
    tokenizer = chat_templates.FAMILIES[family]()
    model.config.prompt_version, model.config.image_token_index = "chat", len(tokenizer)
    make_processor(model.config, tokenizer, images).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    processor = AutoProcessor.from_pretrained(tmp_path)
    expected = asked(tokenizer, model, "chat")
    typed = inference_prompt(QUESTION, "chat", True, tokenizer)
    assert list(processor(images=picture(0), text=typed)["input_ids"][0]) == expected
    for content in CONTENTS.values():
        chat = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        assert list(processor(images=picture(0), text=text)["input_ids"][0]) == expected


# -- checkpoints ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["v1", "chat"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model, tokenizer, images = make_model(image_aspect_ratio="pad")
    with_template(tokenizer, request.param)
    model.generation_config = GenerationConfig(
        temperature=0.9, top_p=0.6, max_length=4096, eos_token_id=2, bos_token_id=1, pad_token_id=0
    )
    save_checkpoint(model, tokenizer, images, folder, prompt_version=request.param, image_aspect_ratio="pad")
    return folder, tokenizer, model, request.param


def test_pipelines_see_the_ids_of_training(checkpoint):
    folder, tokenizer, model, version = checkpoint
    stock = pipeline("image-text-to-text", model=str(folder), device="cpu")
    seen = []
    generate = stock.model.generate
    stock.model.generate = lambda **inputs: (
        seen.append(inputs["input_ids"][0].tolist()),
        generate(**inputs),
    )[1]
    content = [{"type": "image", "image": picture(0)}, {"type": "text", "text": QUESTION}]
    stock(text=[{"role": "user", "content": content}], max_new_tokens=2)
    typed = inference_prompt(QUESTION, version, True, tokenizer)
    stock(images=picture(0), text=typed, max_new_tokens=2)
    assert seen == [asked(tokenizer, model, version)] * 2


def test_a_checkpoint_decodes_greedily_and_without_warnings(checkpoint, recwarn, caplog):
    folder, _, _, _ = checkpoint
    written = json.loads((folder / "generation_config.json").read_text())
    assert written["do_sample"] is False and written["eos_token_id"] == 2
    assert not {"temperature", "top_p", "max_length"} & set(written)
    GenerationConfig.from_pretrained(folder).validate(strict=True)
    stock, processor = (
        LlavaForConditionalGeneration.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    text = processor.apply_chat_template(
        [{"role": "user", "content": f"<image>\n{QUESTION}"}], add_generation_prompt=True
    )
    inputs = processor(images=picture(0), text=text, return_tensors="pt")
    caplog.clear()
    torch.manual_seed(1)
    one = stock.generate(**inputs, max_new_tokens=6)
    torch.manual_seed(2)
    assert torch.equal(one, stock.generate(**inputs, max_new_tokens=6))
    assert not [record for record in caplog.records if "max_length" in record.getMessage()]


def test_a_checkpoints_tokenizer_is_the_llms_again_when_it_is_trained_on(checkpoint):
    folder, tokenizer, _, _ = checkpoint
    _, again, _ = load_model(folder)
    for text in ("the <image> word", "a<image>\nb</s>c", " two", "USER: x ASSISTANT: y</s>USER: z"):
        wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert again(text, add_special_tokens=False)["input_ids"] == wanted
    assert len(again) == len(tokenizer)


def test_an_owner_who_samples_is_followed_and_a_repair_is_not():
    owner = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=[7, 8], max_length=99)
    followed = exported_generation(owner, [5])
    assert (followed.do_sample, followed.temperature, followed.max_length) == (True, 0.6, None)
    assert followed.eos_token_id == [5, 7, 8]
    repaired = exported_generation(GenerationConfig(do_sample=True, temperature=0.9, **{REPAIRED: True}), [2])
    assert (repaired.do_sample, repaired.temperature, repaired.eos_token_id) == (False, None, 2)
    assert REPAIRED not in repaired.to_dict()
    repaired.validate(strict=True)


def test_a_chat_model_ends_where_the_assistants_turn_does():
    tokenizer = chat_templates.qwen()
    base = GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    ends = exported_generation(base, end_ids(tokenizer, "chat")).eos_token_id
    assert ends == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


# -- several pictures and messages, from files to the model -----------------------------------------------


def samples_of(folder, records, version="v1"):
    for index in range(3):
        picture(index).save(folder / f"{index}.png")
    (folder / "notes.json").write_text(json.dumps(records))
    tokenizer = load_tokenizer(LLM)
    if version == "chat":
        tokenizer = with_template(tokenizer, version)
    preprocess = ImagePreprocessor(size=56, mean=(0.5,) * 3, std=(0.5,) * 3, aspect_ratio="pad")
    store = open_samples(folder / "notes.json", folder)
    return EncodedSamples(store, tokenizer, version, 2048, lambda data, tolerant: preprocess(decode(data)))


def talk(question, answer="A star.", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "seven", "conversations": turns} | more


@pytest.mark.parametrize("version", ["v1", "chat"])
def test_several_pictures_reach_the_model_in_the_order_of_their_placeholders(tmp_path, version):
    model, _, _ = make_model(image_aspect_ratio="pad")
    records = [
        talk("Is <image> like <image>?", image=["2.png", "0.png"]),
        talk("Is <image> like <image>?", image=["0.png", "2.png"]),
    ]
    samples = samples_of(tmp_path, records, version)
    collate = Collator.for_model(model.config, samples.tokenizer)
    first, second = collate([samples[0]]), collate([samples[1]])
    assert first["input_ids"].tolist() == second["input_ids"].tolist()
    assert torch.equal(first["pixel_values"], second["pixel_values"].flip(0))
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    seen = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda *call: seen.append(call[2]))
    embeddings = []
    other = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: embeddings.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**first)
    hook.remove()
    other.remove()
    place = first["input_ids"] == model.config.image_token_id
    assert torch.equal(embeddings[0][place], seen[0].flatten(0, -2))


def test_a_record_that_cant_be_used_is_named_with_file_number_and_id(tmp_path):
    """What a record says of itself is judged when the file is opened, its picture when it is read."""
    good = talk("<image>\nWhat?", image="0.png")
    for record, kind in (
        (talk("<image>\nWhat?", "A <image>.", image="0.png"), "more_placeholders"),
        (talk("<image>\nWhat?", image=["0.png", "1.png"]), "fewer_placeholders"),
        (talk("What?") | {"conversations": [{"from": "user", "value": "a"}]}, "no_answer"),
    ):
        with pytest.raises(SamplesError, match=rf"notes\.json: .*\n.*record 2 \(id 'seven'\): {kind}"):
            samples_of(tmp_path, [good, record])
    samples = samples_of(tmp_path, [good, talk("<image>\nWhat?", image="none.png")])
    samples[0]
    name = r"notes\.json, record 2 \(id 'seven', source notes, .*its image can't be used"
    with pytest.raises(TrainingError, match=name):
        samples[1]


def test_a_template_that_cant_be_used_stops_before_a_record_is_read(tmp_path):
    with pytest.raises(TrainingError, match=r"--version chat: .*has no chat template"):
        store = open_samples_of_one(tmp_path)
        EncodedSamples(store, load_tokenizer(LLM), "chat", 2048, lambda data, tolerant: torch.empty(0))


def open_samples_of_one(folder):
    (folder / "a.json").write_text(json.dumps([talk("hi")]))
    return open_samples(folder / "a.json")


def test_stock_tokenizers_read_the_rule(checkpoint):
    """The mark behind a picture is the tokenizer's own doing: no processor and no code of ours."""
    folder, _, _, version = checkpoint
    if version == "v1":
        stock = AutoTokenizer.from_pretrained(folder)
        assert stock.convert_ids_to_tokens(stock("<image>\nx")["input_ids"])[:4] == [
            "<s>",
            "<image>",
            "▁",
            "<0x0A>",
        ]
        assert stock.decode(stock("a red star")["input_ids"], skip_special_tokens=True) == "a red star"


def test_tokenizers_are_saved_under_names_that_transformers_4_and_llavas_loader_know(checkpoint, tmp_path):
    """LLaVA's loader asks for Llama's slow tokenizer, also when the layout is made from a finished
    checkpoint.
    """
    folder, tokenizer, _, _ = checkpoint
    name = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert name == "PreTrainedTokenizerFast"
    convert(folder, tmp_path / "llava", "llava", vision_tower=str(TOWER))
    name = json.loads((tmp_path / "llava" / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert name == "LlamaTokenizer"
    again = AutoTokenizer.from_pretrained(tmp_path / "llava")
    for text in ("the star", "a</s>b", "USER: x ASSISTANT: y</s>USER: z"):
        wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert again(text, add_special_tokens=False)["input_ids"] == wanted
