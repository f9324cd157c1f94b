"""Asks a checkpoint about a picture, in the terminal or on a page, alone or beside others.

    python -m llava_ext.chat --checkpoint experiments/vanilla/hf --image x.jpg
    python -m llava_ext.chat --checkpoint experiments/normalize/hf --image x.jpg --permute \\
        --compare experiments/vanilla/hf
    echo "Where is the cup?" | python -m llava_ext.chat --checkpoint experiments/vanilla/hf --image x.jpg

Answers are greedy, in the template that the checkpoint was trained with, and appear while they are made. In a
terminal, follow-up questions see what was said before; questions from a pipe or from --question stand alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data.templates import TEMPLATES
from .errors import TrainingError, say

if TYPE_CHECKING:
    from PIL import Image

    from .analysis.speaker import Speaker

HELP = "/image PATH takes another picture, /new forgets what was said, an empty line ends"


class Chat:
    """A conversation with one or several speakers about one picture."""

    def __init__(self, speakers: Sequence[Speaker], image: Image.Image | None, max_new_tokens: int) -> None:
        self.speakers = speakers
        self.image = image
        self.max_new_tokens = max_new_tokens
        self.history: dict[str, list[tuple[str, str]]] = {}
        self.forget()

    def forget(self) -> None:
        """The next question is the first one."""
        self.history = {speaker.name: [] for speaker in self.speakers}

    def ask(self, question: str, show: Any) -> dict[str, str]:
        """Each speaker's answer by its name; ``show(name, piece)`` gets them in pieces."""
        answers = {}
        for speaker in self.speakers:
            name, before = speaker.name, self.history[speaker.name]
            answers[name] = speaker.answer(
                self.image, question, before, partial(show, name), self.max_new_tokens
            )
            before.append((question, answers[name]))
        return answers


def open_image(path: Path) -> Image.Image:
    """A picture, as training decodes it.

    Raises:
        TrainingError: there is none that can be read.
    """
    from .data.images import decode

    try:
        return decode(path)
    except (OSError, ValueError) as error:
        raise TrainingError(f"--image {path}: {error}; give a readable picture (JPEG, PNG, ...)") from None


# -- the terminal -----------------------------------------------------------------------------------------


def talk(chat: Chat, lines: Iterator[str]) -> None:
    """Questions of a person, with follow-ups."""
    say(HELP)
    for line in lines:
        word, _, rest = line.partition(" ")
        try:
            if word == "/image":
                chat.image = open_image(Path(rest.strip()))
                chat.forget()
            elif word == "/new":
                chat.forget()
            elif word.startswith("/"):
                say(f"{word}: unknown; {HELP}")
            else:
                show_answers(chat, line)
        except (TrainingError, ValueError) as error:
            say(str(error))


def typed() -> Iterator[str]:
    """Lines from the keyboard, until an empty one, Ctrl-D or Ctrl-C."""
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            return
        yield line


def show_answers(chat: Chat, question: str) -> None:
    """Prints the answers while they are made; several side by side where the output is a terminal."""
    if len(chat.speakers) == 1:
        chat.ask(question, lambda name, piece: print(piece, end="", flush=True))
        print()
    elif sys.stdout.isatty():
        _side_by_side(chat, question)
    else:
        for name, text in chat.ask(question, lambda name, piece: None).items():
            print(f"{name}: {text}", flush=True)


def _side_by_side(chat: Chat, question: str) -> None:
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    texts = {speaker.name: "" for speaker in chat.speakers}

    def table() -> Table:
        made = Table(expand=True)
        for name in texts:
            made.add_column(Text(name))  # brackets are no markup here
        made.add_row(*map(Text, texts.values()))
        return made

    with Live(table()) as live:

        def show(name: str, piece: str) -> None:
            texts[name] += piece
            live.update(table())

        chat.ask(question, show)


# -- the command line -------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_ext.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a checkpoint folder: HF layout, or LLaVA's own")
    add("--image", type=Path, help="the picture (default: none, questions are about text)")
    add("--question", action="append", help="ask this and end; may be given several times")
    add(
        "--compare",
        type=Path,
        action="append",
        default=[],
        help="another checkpoint, answers beside the first",
    )
    add(
        "--permute",
        type=int,
        nargs="?",
        const=0,
        metavar="SEED",
        help="also show the answers with each picture's vision tokens shuffled (seed 0 unless given)",
    )
    add("--max_new_tokens", type=int, default=256, help="an answer's length at most (default: 256)")
    add("--version", choices=sorted(TEMPLATES), help="prompt template (default: the checkpoint's)")
    add("--image_aspect_ratio", choices=("pad", "square"), help="default: the checkpoint's")
    add("--device", help="a torch device (default: the first GPU, else the CPU)")
    add(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on a GPU, else float32"
    )
    add(
        "--page",
        type=int,
        nargs="?",
        const=7860,
        metavar="PORT",
        help="a page on this machine instead of the terminal (needs envs/requirements-chat.txt)",
    )
    return parser


def load_speakers(options: argparse.Namespace) -> list[Speaker]:
    """The checkpoint and those it is compared with, each also with shuffled vision tokens if asked for."""
    import torch

    from .analysis.speaker import load_speaker

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    speakers = []
    for folder in [options.checkpoint, *options.compare]:
        speaker = load_speaker(folder, device, dtype, options.version, options.image_aspect_ratio)
        speakers.append(speaker)
        if options.permute is not None:
            speakers.append(speaker.permuted(options.permute))
    return speakers


def check(options: argparse.Namespace) -> None:
    """Raises :class:`TrainingError` for what would only show after minutes of loading."""
    for name, folder in [
        ("checkpoint", options.checkpoint),
        *(("compare", item) for item in options.compare),
    ]:
        if not (folder / "config.json").is_file():
            raise TrainingError(f"--{name} {folder}: no config.json; give a checkpoint folder")
    folders = [options.checkpoint, *options.compare]
    if len(set(folders)) != len(folders):
        raise TrainingError("--compare: names a checkpoint twice; give other ones")
    if options.max_new_tokens < 1:
        raise TrainingError(f"--max_new_tokens {options.max_new_tokens}: allowed is a number from 1 on")
    if options.page is not None and (options.image or options.question):
        raise TrainingError(
            "--page: picture and question are given on the page; leave --image and --question out"
        )
    if options.permute is not None and options.image is None and options.page is None:
        raise TrainingError("--permute: there are vision tokens only with --image; give a picture")


def run(options: argparse.Namespace) -> None:
    """Loads, then asks: on the page, what the command line says, a person, or a pipe."""
    check(options)
    image = open_image(options.image) if options.image else None
    if options.page is not None:
        from .analysis.page import serve

        return serve(lambda: load_speakers(options), options.page, options.max_new_tokens)
    chat = Chat(load_speakers(options), image, options.max_new_tokens)
    if options.question is None and sys.stdin.isatty():
        return talk(chat, typed())
    for question in options.question or filter(None, map(str.strip, sys.stdin)):
        show_answers(chat, question)
        chat.forget()
    return None


def main(argv: Sequence[str] | None = None) -> None:
    """Answers questions; errors are one readable message."""
    options = make_parser().parse_args(argv)
    try:
        run(options)
    except (TrainingError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
