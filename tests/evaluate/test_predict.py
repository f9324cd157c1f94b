"""Predictions: what the model is shown, what it answers, and that no answer is asked for twice."""

import json
import os
import shutil
import signal

import pandas as pd
import pytest
import torch

from tests.support import warm
from tests.support.demo import load_json
from tests.support.disturb import After, Signal
from workflow_scripts.config.evaluation import TaskSpec
from workflow_scripts.config.shapes import ShapesSource
from workflow_scripts.demo.shapes import generate
from workflow_scripts.evaluate import predict
from workflow_scripts.evaluate.answers import AnswerFile, read_answers
from workflow_scripts.evaluate.asking import Chunk, decode_picture, prompt_batch, prompts_of
from workflow_scripts.evaluate.checkpoint import load_checkpoint, permuted_tokens
from workflow_scripts.evaluate.conditions import Condition, conditions_of
from workflow_scripts.evaluate.pace import read_pace
from workflow_scripts.evaluate.questions import read_questions
from workflow_scripts.evaluate.tasks import TASKS
from workflow_scripts.evaluate.tasks.task import Question
from workflow_scripts.io import UserError, write_json

SHAPES = TASKS["shapes"]
EVERY = {"permuted": 2, "blank": True, "text_only": True}


def task(**changes):
    return TaskSpec.model_validate({"source": "shapes_test", "max_new_tokens": 4, **changes})


def rows_of(manifest):
    content = load_json(manifest)
    return pd.read_parquet(manifest.parent / content["folder"] / "predictions.parquet")


def predicted(folder, export, held_out, shards=1, **changes):
    """The rows, made by so many jobs."""
    manifest = folder / "p" / "manifest.json"
    spec = task(**changes)
    if shards > 1:
        for shard in range(shards):
            note = folder / "p" / "shards" / f"{shard}.json"
            predict.predict_shard(spec, export, held_out[1], manifest, shard, shards, note)
    predict.predict("shapes", spec, export, held_out[1], manifest, shards)
    return rows_of(manifest)


# ---- the questions ----


@pytest.mark.parametrize("archive", ["zip", "tar", "folder"])
def test_pictures_are_read_from_every_kind_of_source(tmp_path, archive):
    made = generate(ShapesSource(split="test", pictures=6, archive=archive, seed=3), tmp_path)
    source = tmp_path / "manifest.json"
    write_json(source, {"name": "t", "digest": "", **made})
    questions = read_questions(task(pictures=4), source)
    names = {item.image for item in questions}
    assert len(names) == 4
    with SHAPES.pictures(source, None, questions) as picture:
        assert all(picture(name).startswith(b"\xff\xd8") for name in names)
    assert not any("<image>" in item.text for item in questions)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question_type": None}, "question_type is missing"),
        ({"image": None}, "image is missing"),
        ({"conversations": [{}] * 4}, "4 turns"),
        ({"conversations": [{}] * 2}, "a turn has no text as its `value`"),
        ({"image": ["1.png", "2.png"]}, "image is .* and no name of one picture"),
        ({"question_type": 3}, "question_type is 3 and no text"),
    ],
)
def test_records_that_are_no_questions_are_named(tmp_path, held_out, change, words):
    folder = tmp_path / "source"
    shutil.copytree(held_out[0], folder)
    records = load_json(folder / "test.json")
    records[2] = {key: value for key, value in {**records[2], **change}.items() if value is not None}
    write_json(folder / "test.json", records)
    with pytest.raises(UserError, match=rf"test\.json, record 3: {words}"):
        SHAPES.read(folder / "manifest.json", None)


def test_a_picture_that_is_not_there_or_no_picture_is_named(held_out):
    absent = Question("q", "../../etc/passwd", "where", "?", ("a",))
    with (
        pytest.raises(UserError, match=r"asked about are not there: \.\./\.\./etc/passwd"),
        SHAPES.pictures(held_out[1], None, [absent]),
    ):
        pass
    with pytest.raises(UserError, match=r"a\.jpg: can't be decoded"):
        decode_picture("a.jpg", b"<html>")


def test_questions_of_one_id_are_told_apart(tmp_path, held_out):
    """LLaVA's ids name pictures."""
    folder = tmp_path / "source"
    shutil.copytree(held_out[0], folder)
    records = [{**record, "id": "same"} for record in load_json(folder / "test.json")]
    write_json(folder / "test.json", records)
    names = [item.name for item in read_questions(task(), folder / "manifest.json")]
    assert names[:3] == ["same", "same#2", "same#3"] and len(set(names)) == len(names)


# ---- what the model is shown ----


@pytest.fixture(params=["stock_export", "compressed_export"])
def export(request):
    return request.getfixturevalue(request.param)


def test_prompts_have_the_ids_of_training(export, held_out):
    """The checkpoint's own chat template, against LLaVA's tokenisation."""
    from PIL import Image

    from llava_ext.data.conversation import IMAGE_TOKEN_INDEX, inference_prompt, prompt_ids
    from llava_ext.model.folders import load_tokenizer

    loaded = load_checkpoint(export)
    asked = read_questions(task(pictures=5, prompt_suffix=" Answer shortly."), held_out[1])
    prompts = prompts_of(loaded.processor, asked)
    batch = prompt_batch(loaded.processor, prompts, [Image.new("RGB", (56, 56))] * len(asked))
    image = loaded.model.config.image_token_id
    tokenizer = load_tokenizer(export.parent / "x" / "hf")
    for row, mask, item in zip(batch["input_ids"], batch["attention_mask"], asked, strict=True):
        assert item.text.endswith("? Answer shortly.")
        ids = [i for i, m in zip(row.tolist(), mask.tolist(), strict=True) if m]
        tokens = ids.count(image)
        assert tokens == (16 if "stock" in str(export) else 4)
        place = ids.index(image)
        collapsed = [*ids[:place], IMAGE_TOKEN_INDEX, *ids[place + tokens :]]
        assert collapsed == prompt_ids(tokenizer, inference_prompt(item.text, "v1", True))
    (text_only,) = prompts_of(loaded.processor, asked[:1], with_picture=False)
    assert tokenizer(text_only).input_ids == prompt_ids(
        tokenizer, inference_prompt(asked[0].text, "v1", False)
    )


def test_each_image_gets_its_own_order_and_the_model_is_left_as_it_was(export):
    model = load_checkpoint(export).model
    pixels = torch.randn(3, 3, 56, 56)

    def tokens():
        found = model.get_image_features(pixel_values=pixels)
        found = getattr(found, "pooler_output", found)
        return torch.stack(list(found))

    plain = tokens()
    with permuted_tokens(model, [7, 8, 7]):
        shuffled = tokens()
    for row, (before, after, seed) in enumerate(zip(plain, shuffled, [7, 8, 7], strict=True)):
        order = torch.randperm(len(before), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(after, before[order]), row
    assert not torch.equal(shuffled, plain)
    assert torch.equal(tokens(), plain)
    with pytest.raises(RuntimeError, match="stop"), permuted_tokens(model, [1, 2, 3]):
        raise RuntimeError("stop")
    assert torch.equal(tokens(), plain)


def test_a_blank_picture_has_the_size_of_the_picture_and_text_only_has_none():
    from PIL import Image

    question = Question("q", "a", "where", "?", ("top",))
    chunk = Chunk([question], {"a": Image.new("RGB", (8, 5), (1, 2, 3))})
    [shown] = chunk.shown([question], Condition("blank"), (9, 9, 9))
    assert (shown.size, shown.getpixel((0, 0))) == ((8, 5), (9, 9, 9))
    assert chunk.shown([question], Condition("normal"), (9, 9, 9)) == [chunk.pictures["a"]]
    assert chunk.shown([question], Condition("text_only"), (9, 9, 9)) is None


# ---- the rows ----


def test_one_row_a_question_and_condition(export, held_out, tmp_path):
    rows = predicted(tmp_path, export, held_out, pictures=6, conditions=EVERY)
    asked = read_questions(task(pictures=6), held_out[1])
    kinds = rows.groupby(["condition", "seed"]).size().to_dict()
    names = [("normal", 0), ("permuted", 0), ("permuted", 1), ("blank", 0), ("text_only", 0)]
    assert kinds == {name: len(asked) for name in names}
    assert not rows.duplicated(["question", "condition", "seed"]).any()
    normal = rows[rows.condition == "normal"]
    assert list(normal.question) == [item.name for item in asked]
    assert list(normal.picture) == [item.image for item in asked]
    assert [list(right) for right in normal.right] == [list(item.answers) for item in asked]
    prompts = rows.groupby("condition").prompt_digest.agg(list).map(set)
    assert prompts["normal"] == prompts["permuted"] == prompts["blank"] != prompts["text_only"]
    assert all(len(tokens) <= 4 for tokens in rows.tokens)
    found = load_json(tmp_path / "p" / "manifest.json")
    assert ("saved beside" in found["checkpoint"]["loaded_with"]) == ("compressed" in str(export))
    assert found["harness"]["version"] and found["checkpoint"]["versions"]["transformers"]


def test_batches_and_shards_change_no_answer(export, held_out, tmp_path):
    """Prompts of different lengths: padding is on the left and masked."""
    alone = predicted(tmp_path / "1", export, held_out, pictures=4, conditions=EVERY, batch_size=1)
    assert alone.text.str.len().nunique() > 1
    together = predicted(tmp_path / "2", export, held_out, pictures=4, conditions=EVERY, batch_size=32)
    shared = predicted(tmp_path / "3", export, held_out, 4, pictures=4, conditions=EVERY, batch_size=3)
    pd.testing.assert_frame_equal(alone, together)
    pd.testing.assert_frame_equal(alone, shared)
    digests = {load_json(tmp_path / name / "p/manifest.json")["digest"] for name in "123"}
    assert len(digests) == 1


def test_blank_pictures_and_missing_ones_hide_the_picture(stock_export, held_out, tmp_path):
    """All questions of equal words get equal answers."""
    rows = predicted(tmp_path, stock_export, held_out, conditions=EVERY)
    for condition in ("blank", "text_only"):
        answers = rows[rows.condition == condition].groupby("text").answer.nunique()
        assert len(answers) > 1 and (answers == 1).all()


def test_what_is_answered_is_not_asked_again(stock_export, held_out, tmp_path, monkeypatch):
    """Half of the answers are there, the last line half written: exactly the others are asked for."""
    whole = predicted(tmp_path / "whole", stock_export, held_out, pictures=6, batch_size=2)
    spec, manifest = task(pictures=6, batch_size=2), tmp_path / "again" / "p" / "manifest.json"
    folder = predict.state_folder(spec, stock_export, held_out[1], manifest)
    questions = read_questions(spec, held_out[1])
    predict.ask_missing(spec, stock_export, held_out[1], folder, questions[:7])
    [part] = folder.glob("answers-*.jsonl")
    part.write_bytes(part.read_bytes()[:-20])
    kept = read_answers(folder)
    predict.ask_missing(spec, stock_export, held_out[1], folder, questions)
    lines = [
        tuple(json.loads(line)[:3])
        for path in folder.glob("answers-*.jsonl")
        for line in path.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    ]
    conditions = conditions_of(spec.conditions)
    assert len(kept) == 7 * len(conditions) - 1
    assert len(lines) == len(set(lines)) == len(questions) * len(conditions)
    # all is answered: no model is loaded, and none is loaded when only the manifest is gone
    monkeypatch.setattr(predict, "load_checkpoint", None)
    predict.predict("shapes", spec, stock_export, held_out[1], manifest)
    pd.testing.assert_frame_equal(rows_of(manifest), whole)
    assert not list(folder.glob("answers-*"))
    answers, seconds = read_pace(manifest.parent)  # of two processes; the cut answer was given twice
    assert answers == len(lines) + 1 and seconds > 0
    manifest.unlink()
    predict.predict("shapes", spec, stock_export, held_out[1], manifest)
    pd.testing.assert_frame_equal(rows_of(manifest), whole)


def test_other_content_is_asked_anew(stock_export, compressed_export, held_out, tmp_path):
    def folder(export=stock_export, **changes):
        return predict.state_folder(task(**changes), export, held_out[1], tmp_path / "manifest.json")

    other = tmp_path / "other.json"
    write_json(other, {**load_json(stock_export), "digest": "another"})
    same = [folder(batch_size=5), folder(shards=3), folder(metric="yes_no"), folder(examples=0)]
    assert set(same) == {folder()}
    changed = [folder(other), folder(prompt_suffix="!"), folder(permute_seed=1), folder(pictures=3)]
    assert len({folder(), *changed}) == 5


def test_a_part_that_no_shard_answered_is_an_error(stock_export, held_out, tmp_path):
    spec, manifest = task(pictures=3, shards=2), tmp_path / "p" / "manifest.json"
    predict.predict_shard(spec, stock_export, held_out[1], manifest, 1, 2, tmp_path / "note.json")
    with pytest.raises(UserError, match=r"have no answer, e\.g\. .*; delete the files `shard-"):
        predict.predict("shapes", spec, stock_export, held_out[1], manifest, 2)


@pytest.mark.slow
def test_kill_9_loses_no_answer(stock_export, held_out, tmp_path):
    """The real step, killed in the middle and started again."""
    spec = task(pictures=6, batch_size=1)
    manifest = tmp_path / "p" / "manifest.json"
    argv = ["--task", "shapes", "--spec", spec.model_dump_json()]
    argv += ["--checkpoint", str(stock_export), "--source", str(held_out[1]), "--manifest", str(manifest)]
    folder = predict.state_folder(spec, stock_export, held_out[1], manifest)
    program, killed = predict.__name__, After(AnswerFile.append, Signal(signal.SIGKILL), calls=10)
    log, environment = tmp_path / "log", {**os.environ, "OMP_NUM_THREADS": "1"}
    status = warm.run(program, argv, log, tmp_path, environment, timeout=900, before=killed)
    assert status == -signal.SIGKILL, log.read_text()
    answered = read_answers(folder)
    total = len(read_questions(spec, held_out[1])) * 3
    assert len(answered) == 10 < total
    predict.main(argv)
    rows = rows_of(manifest)
    assert len(rows) == total
    said = {(row.question, row.condition, row.seed): row.answer for row in rows.itertuples()}
    assert all(said[key] == item.text for key, item in answered.items())


# ---- what is refused ----


def test_changed_code_beside_the_weights_is_not_run(compressed_export, tmp_path):
    copy = tmp_path / "export"
    shutil.copytree(compressed_export.parent, copy)
    code = next((copy / "x" / "hf").glob("modeling*.py"))
    code.write_text(code.read_text() + "\nraise SystemExit('run')\n")
    with pytest.raises(UserError, match="not the file that the export wrote"):
        load_checkpoint(copy / "manifest.json")


def test_weights_that_do_not_fit_are_refused(stock_export, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "export"
    shutil.copytree(stock_export.parent, copy)
    path = copy / "x" / "hf" / "model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if "multi_modal_projector" in name))
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing_keys"):
        load_checkpoint(copy / "manifest.json")


def test_a_wrong_spec_has_no_traceback(capsys):
    spec = '{"source": "s", "picture": 3}'
    files = ["--checkpoint", "x", "--source", "x", "--manifest", "x"]
    with pytest.raises(SystemExit, match="1"):
        predict.main(["--task", "t", "--spec", spec, *files])
    assert "picture" in capsys.readouterr().err


def test_a_source_without_questions_is_named(tmp_path):
    write_json(tmp_path / "manifest.json", {"images": None, "annotations": []})
    with pytest.raises(UserError, match="has no questions of kind: shapes"):
        read_questions(task(), tmp_path / "manifest.json")
