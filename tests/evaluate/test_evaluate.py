"""The evaluation: what it counts, what it shows the model, what it refuses."""

import shutil

import pytest
import torch

from tests.support.demo import load_json
from workflow_scripts.config.evaluation import EvaluationSpec
from workflow_scripts.config.shapes import ShapesSource
from workflow_scripts.demo.shapes import generate
from workflow_scripts.evaluate import step as evaluate
from workflow_scripts.evaluate.tasks import TASKS
from workflow_scripts.evaluate.tasks.task import Question, Task
from workflow_scripts.io import UserError, write_json

SHAPES = TASKS["shapes"]


def questions_of(manifest, pictures=None):
    return evaluate.first_pictures(SHAPES.read(manifest), pictures)


def question(kind, answer, name="q"):
    return Question(name, "1.jpg", kind, "?", answer)


def test_accuracies_of_a_hand_made_oracle():
    asked = [
        question("where", "top left"),
        question("where", "top right"),
        question("where", "bottom left"),
        question("where", "bottom right"),
        question("colour", "red"),
        question("colour", "blue"),
    ]
    given = ["top left", "Top  Right.", "left", "", "reddish", "blue"]
    assert evaluate.accuracies(SHAPES, asked, given) == {"where": 0.5, "colour": 0.5}
    assert evaluate.accuracies(SHAPES, asked, [q.answer for q in asked]) == {"where": 1.0, "colour": 1.0}
    assert SHAPES.chance(asked) == {"where": 0.25, "colour": 0.5}
    assert evaluate.counts(asked) == {"where": 4, "colour": 2}


def test_answers_and_questions_must_be_as_many():
    with pytest.raises(ValueError, match="shorter"):
        evaluate.accuracies(SHAPES, [question("where", "a"), question("where", "b")], ["a"])


# ---- reading the source ----


@pytest.mark.parametrize("archive", ["zip", "tar", "folder"])
def test_pictures_are_read_from_every_kind_of_source(tmp_path, archive):
    made = generate(ShapesSource(split="test", pictures=6, archive=archive, seed=3), tmp_path)
    write_json(tmp_path / "manifest.json", {"name": "t", "digest": "", **made})
    questions = questions_of(tmp_path / "manifest.json", 4)
    pictures = evaluate.read_pictures(tmp_path / "manifest.json", [q.image for q in questions])
    assert len(pictures) == 4
    assert all(data.startswith(b"\xff\xd8") for data in pictures.values())
    assert not any("<image>" in q.text for q in questions)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question_type": None}, "question_type is missing"),
        ({"image": None}, "image is missing"),
        ({"conversations": [{}] * 4}, "4 turns"),
    ],
)
def test_records_that_are_no_questions_are_named(tmp_path, held_out, change, words):
    folder = tmp_path / "source"
    shutil.copytree(held_out[0], folder)
    records = load_json(folder / "test.json")
    records[2] = {key: value for key, value in {**records[2], **change}.items() if value is not None}
    write_json(folder / "test.json", records)
    with pytest.raises(UserError, match=rf"test\.json, record 3: {words}"):
        SHAPES.read(folder / "manifest.json")


def test_a_picture_that_is_not_there_is_named(held_out):
    with pytest.raises(UserError, match=r"has no picture \.\./\.\./etc/passwd"):
        evaluate.read_pictures(held_out[1], ["../../etc/passwd"])


# ---- asking ----


@pytest.fixture(params=["stock_export", "compressed_export"])
def export(request):
    return request.getfixturevalue(request.param)


def test_prompts_have_the_ids_of_training(export, held_out):
    """The checkpoint's own chat template, against LLaVA's tokenisation."""
    from PIL import Image

    from llava_ext.data.conversation import IMAGE_TOKEN_INDEX, inference_prompt, prompt_ids
    from llava_ext.model.parts import load_tokenizer

    loaded = evaluate.load_checkpoint(export)
    asked = questions_of(held_out[1], 5)
    batch = evaluate.prompt_batch(loaded.processor, asked, [Image.new("RGB", (56, 56))] * len(asked))
    image = loaded.model.config.image_token_id
    tokenizer = load_tokenizer(export.parent / "x" / "hf")
    for row, mask, item in zip(batch["input_ids"], batch["attention_mask"], asked, strict=True):
        ids = [i for i, m in zip(row.tolist(), mask.tolist(), strict=True) if m]
        tokens = ids.count(image)
        assert tokens == (16 if "stock" in str(export) else 4)
        place = ids.index(image)
        collapsed = [*ids[:place], IMAGE_TOKEN_INDEX, *ids[place + tokens :]]
        assert collapsed == prompt_ids(tokenizer, inference_prompt(item.text, "v1", True))


def test_each_image_gets_its_own_order_and_the_model_is_left_as_it_was(export):
    model = evaluate.load_checkpoint(export).model
    pixels = torch.randn(3, 3, 56, 56)

    def tokens():
        found = model.get_image_features(pixel_values=pixels)
        found = getattr(found, "pooler_output", found)
        return torch.stack(list(found))

    plain = tokens()
    with evaluate.permuted_tokens(model, [7, 8, 7]):
        shuffled = tokens()
    for row, (before, after, seed) in enumerate(zip(plain, shuffled, [7, 8, 7], strict=True)):
        order = torch.randperm(len(before), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(after, before[order]), row
    assert not torch.equal(shuffled, plain)
    assert torch.equal(tokens(), plain)
    with pytest.raises(RuntimeError, match="stop"), evaluate.permuted_tokens(model, [1, 2, 3]):
        raise RuntimeError("stop")
    assert torch.equal(tokens(), plain)


def test_an_evaluation_writes_what_the_model_answers(export, held_out, tmp_path):
    """An untrained model; the counts are made again here from the answers of single questions."""
    spec = EvaluationSpec(source="shapes_test", pictures=12, batch_size=7, examples=3, max_new_tokens=4)
    manifest = tmp_path / "r" / "manifest.json"
    evaluate.main(
        [
            "--spec",
            spec.model_dump_json(),
            "--checkpoint",
            str(export),
            "--source",
            str(held_out[1]),
            "--manifest",
            str(manifest),
        ]
    )
    result = load_json(manifest)
    asked = questions_of(held_out[1], 12)
    pictures = evaluate.read_pictures(held_out[1], [q.image for q in asked])
    one_by_one = evaluate.ask(
        evaluate.load_checkpoint(export), asked, pictures, spec.model_copy(update={"batch_size": 1})
    )
    assert result["accuracy"] == {
        c: evaluate.accuracies(SHAPES, asked, one_by_one[c]) for c in evaluate.CONDITIONS
    }
    assert result["questions"] == evaluate.counts(asked)
    assert result["pictures"] == 12
    shown = {
        q["question"]: q
        for example in result["examples"]
        for q in example["questions"]
        if example["image"] == asked[0].image
    }
    assert shown[asked[0].text]["answers"] == {c: one_by_one[c][0] for c in evaluate.CONDITIONS}
    assert len(result["examples"]) == 3
    assert ("saved beside" in result["checkpoint"]["loaded_with"]) == ("compressed" in str(export))


def test_the_blank_picture_hides_the_picture(stock_export, held_out):
    """All questions of equal words get equal answers about a blank picture."""
    asked = questions_of(held_out[1])
    pictures = evaluate.read_pictures(held_out[1], [q.image for q in asked])
    answers = evaluate.ask(
        evaluate.load_checkpoint(stock_export), asked, pictures, EvaluationSpec(source="s", batch_size=50)
    )
    by_text = {}
    for item, answer in zip(asked, answers["blank"], strict=True):
        by_text.setdefault(item.text, set()).add(answer)
    assert all(len(found) == 1 for found in by_text.values())


def test_changed_code_beside_the_weights_is_not_run(compressed_export, tmp_path):
    copy = tmp_path / "export"
    shutil.copytree(compressed_export.parent, copy)
    code = next((copy / "x" / "hf").glob("modeling*.py"))
    code.write_text(code.read_text() + "\nraise SystemExit('run')\n")
    with pytest.raises(UserError, match="not the file that the export wrote"):
        evaluate.load_checkpoint(copy / "manifest.json")


def test_weights_that_do_not_fit_are_refused(stock_export, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "export"
    shutil.copytree(stock_export.parent, copy)
    path = copy / "x" / "hf" / "model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if "multi_modal_projector" in name))
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing_keys"):
        evaluate.load_checkpoint(copy / "manifest.json")


def test_a_wrong_spec_has_no_traceback(capsys, tmp_path):
    with pytest.raises(SystemExit, match="1"):
        evaluate.main(
            [
                "--spec",
                '{"source": "s", "picture": 3}',
                "--checkpoint",
                "x",
                "--source",
                "x",
                "--manifest",
                "x",
            ]
        )
    assert "picture" in capsys.readouterr().err


def test_a_task_that_is_not_registered_is_refused_with_the_list():
    with pytest.raises(ValueError, match="'shapes'"):
        EvaluationSpec(source="s", task="shape")


def test_another_kind_of_task_is_an_entry(stock_export, held_out, tmp_path, monkeypatch):
    """Its own questions, its own idea of what is right: here the questions backwards, and everything is
    right.
    """
    lenient = Task(
        "lenient", lambda source: SHAPES.read(source)[::-1], lambda given, right: True, lambda asked: {}
    )
    monkeypatch.setitem(TASKS, "lenient", lenient)
    spec = EvaluationSpec(source="s", pictures=2, examples=0).model_copy(update={"task": "lenient"})
    result = evaluate.evaluate(spec, stock_export, held_out[1], tmp_path / "r" / "manifest.json")
    assert all(share == 1 for shares in result["accuracy"].values() for share in shares.values())
    assert result["spec"]["task"] == "lenient" and result["chance"] == {}
