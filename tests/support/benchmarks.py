"""Small parquet files in the form of published benchmarks: the same columns, a few drawn pictures."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image


def picture(number: int, shape: str = "RGB", kind: str = "PNG") -> dict[str, Any]:
    """A picture as the hub's files hold it."""
    stream = io.BytesIO()
    image = Image.new("RGB", (24, 16), (10 * number, 80, 200 - number))
    image.putpixel((number, 3), (255, 255, 255))
    image.convert(shape).save(stream, kind)
    return {"bytes": stream.getvalue(), "path": f"{number}.{kind.lower()}"}


def people(*answers: str) -> list[str]:
    """Ten people's answers."""
    return [answers[i % len(answers)] for i in range(10)]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark in small.

    Attributes:
        task: its name in lmms-eval.
        answers: what is answered, row by row; some right, some wrong, some in other words.
        lmms: the other keys of a task's section `lmms`.
        pictures: rows of the file with the pictures, where they are not beside the questions.
    """

    task: str
    rows: list[dict[str, Any]]
    answers: list[str]
    lmms: dict[str, Any] = field(default_factory=dict)
    pictures: list[dict[str, Any]] = field(default_factory=list)


def pope(task: str, category: str) -> Benchmark:
    right = ["yes", "no", "yes", "no"]
    rows = [
        {"id": str(i), "question_id": str(i + 1), "question": f"Is there a cup {i}?", "answer": answer}
        | {"image_source": f"COCO_{i // 2}", "image": picture(i // 2), "category": category}
        for i, answer in enumerate(right)
    ]
    return Benchmark(task, rows, ["Yes", "yes", "no", "No."], {"stratum": "category"})


def cv_bench(task: str, sort: str) -> Benchmark:
    rows = [
        {"idx": i, "type": sort, "task": "Count" if i else "Relation", "image": picture(i)}
        | {"question": "How many?", "choices": ["1", "2", "3"], "answer": f"({'ABC'[i]})"}
        | {"prompt": "How many? Select from the following choices.\n(A) 1\n(B) 2\n(C) 3"}
        | {"filename": f"img/{i}.png", "source": "COCO"}
        for i in range(3)
    ]
    return Benchmark(task, rows, ["(A)", "B. 2", "the third"], {"stratum": "task"})


def visual_qa() -> Benchmark:
    given = [people("red"), people("blue", "dark blue", "navy"), people("two", "2", "a 2")]
    rows = [
        {"question_type": "what", "multiple_choice_answer": said[0], "image_id": i, "answer_type": "other"}
        | {"answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(said)]}
        | {"question_id": i, "question": "What colour is it?", "image": picture(i)}
        for i, said in enumerate(given)
    ]
    return Benchmark("vqav2_val", rows, ["red", "Blue.", "2"], {"answer": "multiple_choice_answer"})


def text_vqa() -> Benchmark:
    rows = [
        {"image_id": f"i{i}", "question_id": i, "question": "what does it say?", "image": picture(i)}
        | {"answers": people(*said), "ocr_tokens": ["STOP", "now"], "set_name": "val"}
        for i, said in enumerate([["stop"], ["now", "stop now"]])
    ]
    return Benchmark("textvqa_val", rows, ["STOP", "now"], {"answer": "answers"})


def science_qa() -> Benchmark:
    rows = [
        {"image": picture(i), "question": "Which is a plant?", "choices": ["cat", "oak", "rock"], "answer": 1}
        | {"hint": "Look." if i else "", "subject": "natural science", "topic": "biology", "lecture": ""}
        for i in range(3)
    ]
    return Benchmark("scienceqa_img", rows, ["B", "B. oak", "A"], {"stratum": "subject"})


def mm_bench() -> Benchmark:
    rows = [
        {"index": i, "question": "Which?", "hint": "nan", "answer": "B", "A": "cat", "B": "dog", "C": "cup"}
        | {"D": "nan", "category": "object", "image": picture(i), "source": "s", "L2-category": "what"}
        | {"comment": "nan", "split": "dev"}
        for i in range(3)
    ]
    return Benchmark(
        "mmbench_en_dev_static",
        rows,
        ["B", "dog", "A"],
        {"metric": "gpt_eval_score", "full_score": 100, "stratum": "L2-category"},
    )


def seed_bench() -> Benchmark:
    rows = [
        {"answer": "C", "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4", "data_id": str(i)}
        | {"data_type": "video" if i == 1 else "image", "question": "How many?", "question_id": str(i)}
        | {"question_type_id": 1, "image": [picture(i)] * (1 + (i == 1)), "segment": None}
        for i in range(4)
    ]
    return Benchmark("seedbench", rows, ["C", "", "C. 3", "A"], {"only": {"data_type": "image"}})


def mme() -> Benchmark:
    rows = [
        {"question_id": f"{kind}/{i}", "image": picture(i), "question": f"Is it {i}? {ask}", "answer": answer}
        | {"category": kind}
        for i, kind in enumerate(["color", "color", "code_reasoning"])
        for answer, ask in (("Yes", "Please answer yes or no."), ("No", "Please answer yes or no."))
    ]
    return Benchmark("mme", rows, ["Yes", "no", "yes", "yes", "No", "maybe"], {"stratum": "category"})


def mmvp() -> Benchmark:
    rows = [
        {"Index": i + 1, "Question": "Open?", "Options": "(a) Yes (b) No", "image": picture(i)}
        | {"Correct Answer": f"({'ab'[i % 2]})"}
        for i in range(4)
    ]
    return Benchmark("mmvp", rows, ["A", "(B)", "The answer is A", "A"])


def real_world_qa() -> Benchmark:
    ask = "Which way?\nA. left\nB. right\nPlease answer directly with only the letter of the correct option"
    rows = [
        {"image": picture(i, kind="WEBP"), "question": ask + " and nothing else.", "answer": answer}
        | {"image_path": f"{i}.webp"}
        for i, answer in enumerate(["A", "B", "3"])
    ]
    return Benchmark("realworldqa", rows, ["A", "A.", "3"])


def gqa() -> Benchmark:
    """Its pictures lie in files of their own."""
    rows = [
        {"id": f"q{i}", "imageId": f"n{i // 2}", "question": "Is it on the left?", "answer": answer}
        | {"fullAnswer": f"{answer}.", "isBalanced": True}
        for i, answer in enumerate(["yes", "table", "red"])
    ]
    table = {"files": "images-*.parquet", "name": "id", "picture": "image", "question": "imageId"}
    lmms = {"files": "instructions-*.parquet", "pictures": table}
    shown = [{"id": f"n{i}", "image": picture(i, kind="JPEG")} for i in range(2)]
    return Benchmark("gqa", rows, ["Yes.", "Table", "blue"], lmms, shown)


BENCHMARKS = [
    pope("pope_random", "random"),
    pope("pope_pop", "popular"),
    pope("pope_adv", "adversarial"),
    gqa(),
    cv_bench("cv_bench_2d", "2D"),
    cv_bench("cv_bench_3d", "3D"),
    visual_qa(),
    text_vqa(),
    science_qa(),
    mm_bench(),
    seed_bench(),
    mme(),
    mmvp(),
    real_world_qa(),
]


def write_rows(rows: list[dict[str, Any]], path: Path, marked: bool = True) -> None:
    """As the hub's files: with a note of which columns are pictures, or (not ``marked``) without."""
    from datasets import Dataset, Features, Image, List

    table = Dataset.from_list(rows)
    features = Features(table.features)
    shown = List(Image()) if isinstance(rows[0]["image"], list) else Image()
    if marked:
        table = table.cast(Features({**features, "image": shown}))
    table.to_parquet(str(path))
