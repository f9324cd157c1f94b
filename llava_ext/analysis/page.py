"""The chat on a page: a picture, a question, and each checkpoint's answer. Needs Gradio."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from queue import Queue
from threading import Thread
from typing import Any

from ..errors import TrainingError
from .speaker import Speaker

END = object()


def require_gradio() -> Any:
    """Gradio, or a message that says how to get it."""
    try:
        import gradio
    except ImportError:
        raise TrainingError(
            "--page: Gradio is not installed; pip install -r envs/requirements-chat.txt, or leave --page out"
        ) from None
    return gradio


def stream(speaker: Speaker, image: Any, question: str, max_new_tokens: int) -> Iterator[str]:
    """The answer so far, each time it grows.

    Raises:
        ValueError: as :meth:`Speaker.answer`.
    """
    pieces: Queue[Any] = Queue()

    def work() -> None:
        try:
            speaker.answer(image, question, show=pieces.put, max_new_tokens=max_new_tokens)
            pieces.put(END)
        except Exception as error:  # noqa: BLE001 (whatever it is, the page's thread raises it)
            pieces.put(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    text = ""
    while (piece := pieces.get()) is not END:
        if isinstance(piece, Exception):
            raise piece
        text += piece
        yield text
    thread.join()


def make_page(speakers: Sequence[Speaker], max_new_tokens: int) -> Any:
    """The page; one box for each speaker's answer."""
    gradio = require_gradio()

    def ask(image: Any, question: str) -> Iterator[list[str]]:
        texts = [""] * len(speakers)
        try:
            for place, speaker in enumerate(speakers):
                for text in stream(speaker, image, question.strip(), max_new_tokens):
                    texts[place] = text
                    yield list(texts)
        except ValueError as error:
            raise gradio.Error(str(error)) from None

    with gradio.Blocks(title="Questions about a picture", analytics_enabled=False) as page:
        with gradio.Row():
            image = gradio.Image(type="pil", image_mode="RGB", label="Picture")
            question = gradio.Textbox(label="Question", lines=2)
        with gradio.Row():
            boxes = [gradio.Textbox(label=speaker.name, interactive=False) for speaker in speakers]
        button = gradio.Button("Ask", variant="primary")
        gradio.on([button.click, question.submit], ask, [image, question], boxes, api_name="ask")
    return page


def serve(load: Callable[[], Sequence[Speaker]], port: int, max_new_tokens: int) -> None:
    """Serves the page on this machine alone until Ctrl-C."""
    require_gradio()  # before minutes of loading
    page = make_page(load(), max_new_tokens)
    page.queue(default_concurrency_limit=1).launch(server_name="127.0.0.1", server_port=port, share=False)
