"""Trying a checkpoint: answers are those of an evaluation, in pieces, with follow-ups, beside others."""

from __future__ import annotations

import dataclasses
import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_ext import chat
from llava_ext.analysis.generation import answer
from llava_ext.analysis.speaker import load_speaker
from llava_ext.checkpoints.stored import load_model, save_checkpoint
from llava_ext.data.conversation import encode, inference_ids, inference_prompt
from llava_ext.errors import TrainingError
from tests.support.models import flags, make_model, picture
from tests.support.trainings import REPOSITORY, environment

QUESTION = "Where is the star?"


def save(folder: Path, *names: str) -> Path:
    model, tokenizer, images = make_model(flags(*names))
    save_checkpoint(model, tokenizer, images, folder, prompt_version="v1", image_aspect_ratio="pad")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A vanilla and a variant checkpoint, and a picture."""
    folder = tmp_path_factory.mktemp("chat")
    save(folder / "vanilla")
    save(folder / "compressed", "compression_after_projection")
    picture(0).save(folder / "picture.png")
    return folder


def asked(folder, *more, capsys):
    chat.main(
        ["--checkpoint", str(folder / "vanilla"), "--image", str(folder / "picture.png"), "--device", "cpu",
         "--max_new_tokens", "8", *map(str, more)]
    )  # fmt: skip
    return capsys.readouterr().out


def evaluated(folder, **options):
    model, tokenizer, images = load_model(folder)
    settings = {"max_new_tokens": 8, "image_aspect_ratio": "pad"} | options
    return answer(model, tokenizer, images, [(picture(0), QUESTION)], **settings)[0]


def test_an_answer_is_that_of_an_evaluation(folder, capsys):
    assert asked(folder, "--question", QUESTION, capsys=capsys).strip() == evaluated(folder / "vanilla")


def test_questions_from_a_pipe_stand_alone(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n\n{QUESTION}\n"))
    first, second = asked(folder, capsys=capsys).splitlines()
    assert first.strip() == second.strip() == evaluated(folder / "vanilla")


def test_checkpoints_and_their_permutation_are_compared(folder, capsys):
    other = folder / "compressed"
    out = asked(folder, "--question", QUESTION, "--permute", "3", "--compare", other, capsys=capsys)
    names = [f"{folder / name}{end}: " for name in ("vanilla", "compressed")
             for end in ("", ", vision tokens permuted (3)")]  # fmt: skip
    expected = [
        evaluated(folder / name, permute_seed=seed)
        for name in ("vanilla", "compressed")
        for seed in (None, 3)
    ]
    assert out.splitlines() == [name + text for name, text in zip(names, expected, strict=True)]


def test_pieces_are_the_answer(folder):
    speaker = load_speaker(folder / "vanilla", torch.device("cpu"), torch.float32)
    pieces: list[str] = []
    whole = speaker.answer(picture(0), QUESTION, show=pieces.append, max_new_tokens=12)
    assert len(pieces) > 1 and "".join(pieces).strip() == whole


def test_a_follow_up_is_asked_as_training_sees_a_second_round():
    """The ids of the prompt are the beginning of the same dialogue's training ids."""
    _, tokenizer, _ = make_model()
    rounds = [(QUESTION, "Above the square."), ("And the circle?", "Below it.")]
    turns = [{"from": role, "value": text} for pair in rounds
             for role, text in zip(("human", "gpt"), pair, strict=True)]  # fmt: skip
    turns[0]["value"] = f"<image>\n{QUESTION}"
    trained = encode({"image": "a.png", "conversations": turns}, tokenizer, "v1", 2048).input_ids
    prompt = inference_prompt("And the circle?", "v1", True, tokenizer, rounds[:1])
    ids = inference_ids(tokenizer, prompt, "v1", True)
    assert trained[: len(ids)] == ids and len(ids) < len(trained)


@pytest.mark.slow
def test_a_person_asks_on_and_takes_another_picture(folder, tmp_path):
    """In a terminal: two questions, the second with the first in mind; then a new picture, and an end."""
    picture(3).save(tmp_path / "other.png")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "llava_ext.chat", "--checkpoint", folder / "vanilla", "--image",
               folder / "picture.png", "--max_new_tokens", "4", "--device", "cpu"]  # fmt: skip
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment(),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    lines = [
        QUESTION,
        "And the circle?",
        "/nonsense",
        f"/image {tmp_path / 'other.png'}",
        "/image gone.png",
        "",
    ]
    os.write(ours, "".join(f"{line}\n" for line in lines).encode())
    out, said = (text.decode() for text in process.communicate(timeout=200))
    os.close(ours), os.close(theirs)
    assert process.returncode == 0, said
    assert len([line for line in out.splitlines() if line.strip(" >")]) == 2
    assert "/nonsense: unknown" in said and "gone.png" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere: no config.json; give a checkpoint folder"),
        (["--checkpoint", "VANILLA", "--compare", "VANILLA"], "names a checkpoint twice"),
        (["--checkpoint", "VANILLA", "--permute"], "only with --image"),
        (["--checkpoint", "VANILLA", "--page", "--question", "What?"], "given on the page"),
        (["--checkpoint", "VANILLA", "--image", "gone.png"], "--image gone.png"),
        (["--checkpoint", "VANILLA", "--max_new_tokens", "0"], "a number from 1 on"),
        (["--checkpoint", "VANILLA", "--question", "what is <image>?"], "needs one <image>"),
    ],
)
def test_mistakes_are_one_sentence(folder, arguments, message, capsys):
    given = [str(folder / "vanilla") if word == "VANILLA" else word for word in arguments]
    with pytest.raises(SystemExit):
        chat.main(given)
    assert message in capsys.readouterr().err


def test_a_picture_that_is_none(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>")
    with pytest.raises(TrainingError, match="give a readable picture"):
        chat.open_image(tmp_path / "page.jpg")


def test_without_gradio_the_page_says_how_to_get_it(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit):
        chat.main(["--checkpoint", str(folder / "vanilla"), "--page"])
    assert "pip install -r envs/requirements-chat.txt" in capsys.readouterr().err


def test_columns_side_by_side_are_no_markup(folder, monkeypatch):
    """In a terminal; a folder's name may have brackets, as an answer may."""
    from rich.console import Console

    speaker = load_speaker(folder / "vanilla", torch.device("cpu"), torch.float32)
    named = dataclasses.replace(speaker, name="a [red] folder")
    screen = Console(file=io.StringIO(), force_terminal=True, width=160)
    monkeypatch.setattr("rich.live.get_console", lambda: screen)
    chat._side_by_side(chat.Chat([named, named.permuted(1)], picture(0), 4), QUESTION)
    assert "a [red] folder, vision tokens permuted (1)" in screen.file.getvalue()


def test_the_page_gives_the_same_answers_over_http(folder):
    gradio = pytest.importorskip("gradio", reason="the page needs Gradio (envs/requirements-chat.txt)")
    from gradio_client import Client, handle_file

    from llava_ext.analysis.page import make_page

    speaker = load_speaker(folder / "vanilla", torch.device("cpu"), torch.float32)
    page = make_page([speaker, speaker.permuted(3)], 8)
    _, url, _ = page.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
    try:
        found = Client(url, verbose=False).predict(
            handle_file(folder / "picture.png"), QUESTION, api_name="/ask"
        )
    finally:
        page.close()
        gradio.close_all()
    assert [text.strip() for text in found] == [
        evaluated(folder / "vanilla"), evaluated(folder / "vanilla", permute_seed=3)
    ]  # fmt: skip
