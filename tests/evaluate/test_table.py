"""Questions of one's own: JSON, JSON lines, CSV and parquet, pictures beside them or inside."""

import csv
import io
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image

from workflow_scripts.acquire.step import main as acquire
from workflow_scripts.config.evaluation import TaskSpec
from workflow_scripts.config.question_fields import FieldsSpec
from workflow_scripts.evaluate.metrics import METRICS
from workflow_scripts.evaluate.questions import read_questions
from workflow_scripts.evaluate.tasks import TASKS
from workflow_scripts.io import UserError

TABLE = TASKS["table"]
FIELDS = {"question": "q", "answer": "a", "picture": "file", "stratum": "kind", "choices": "options"}
RECORDS = [
    {"q": "What is it?", "a": 1, "file": "1.png", "kind": "what", "options": ["a cat", "a dog"]},
    {"q": "Where is it?", "a": "B", "file": "2.png", "kind": "where", "options": ["left", "right", "top"]},
]


def picture(shade):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write(path, records):
    if path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".parquet":
        pd.DataFrame([{**record, "a": str(record["a"])} for record in records]).to_parquet(path)
    else:
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(records[0]))
            writer.writeheader()
            writer.writerows({**r, "options": json.dumps(r["options"])} for r in records)


def source(folder, path, images=True):
    """The user's own files as a source, by the acquire step."""
    (folder / "pictures").mkdir(exist_ok=True)
    for number in (1, 2):
        (folder / "pictures" / f"{number}.png").write_bytes(picture(number))
    spec = {"kind": "path", "annotations": [str(path)]}
    spec |= {"images": str(folder / "pictures")} if images else {}
    manifest = folder / "source" / "manifest.json"
    acquire(["--name", "mine", "--spec", json.dumps(spec), "--manifest", str(manifest)])
    return manifest


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_form_gives_the_same_questions(tmp_path, suffix):
    records = RECORDS if suffix in (".json", ".jsonl") else [{**RECORDS[0], "a": "B"}, RECORDS[1]]
    path = tmp_path / f"questions{suffix}"
    write(path, records)
    manifest = source(tmp_path, path)
    spec = TaskSpec(source="mine", kind="table", fields=FieldsSpec(**FIELDS), prompt_suffix="\nLetter:")
    first, second = read_questions(spec, manifest)
    assert first.text == "What is it?\nA. a cat\nB. a dog\nLetter:"
    assert (first.answers, first.choices, first.type) == (("B",), ("a cat", "a dog"), "what")
    assert (second.name, second.image, second.choices[2]) == ("2", "2.png", "top")
    with TABLE.pictures(manifest, spec.fields, [first, second]) as shown:
        assert shown("2.png") == picture(2)


def test_pictures_inside_parquet_are_told_apart_by_their_content(tmp_path):
    """As the hub's files hold them, each picture once more for each of its questions."""
    shades = [1, 1, 2]
    rows = [
        {"question": f"{i}?", "answer": "yes", "image": {"bytes": picture(shade), "path": None}}
        for i, shade in enumerate(shades)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "test.parquet")
    manifest = source(tmp_path, tmp_path / "test.parquet", images=False)
    questions = TABLE.read(manifest, FieldsSpec())
    names = [item.image for item in questions]
    assert names[0] == names[1] != names[2]
    with TABLE.pictures(manifest, FieldsSpec(), questions) as shown:
        assert [shown(name) for name in names] == [picture(shade) for shade in shades]


def test_benchmarks_in_one_parquet_file_are_scored_by_their_columns(tmp_path):
    """CV-Bench's form: the answer as (A), choices as a list, one task a row, the picture in the row."""
    rows = [
        {"task": "Count", "question": "How many?", "choices": ["1", "2"], "answer": "(B)"},
        {"task": "Depth", "question": "Which is nearer?", "choices": ["cup", "box", "hat"], "answer": "(A)"},
    ]
    shown = [{**row, "image": {"bytes": picture(9), "path": "x.png"}} for row in rows]
    pd.DataFrame(shown).to_parquet(tmp_path / "test_2d.parquet")
    columns = {"picture": "image", "stratum": "task", "choices": "choices"}
    spec = TaskSpec(source="m", kind="table", metric="choice_letter", fields=FieldsSpec(**columns))
    found = read_questions(spec, source(tmp_path, tmp_path / "test_2d.parquet", images=False))
    assert [item.type for item in found] == ["Count", "Depth"]
    score = METRICS[spec.metric].score
    assert [score("B", item.answers, item.choices) for item in found] == [1, 0]
    assert score("cup", found[1].answers, found[1].choices) == 1
    chance = METRICS[spec.metric].chance([(item.answers, item.choices) for item in found])
    assert chance == pytest.approx((1 / 2 + 1 / 3) / 2)


def spatial_task(name, tmp_path, **sources):
    """A task of docs/evaluation.md over these files."""
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    [block] = [text for text in re.findall(r"```yaml\n(.*?)```", page, re.S) if "whatsup:" in text]
    section = yaml.safe_load(block)["evaluation"]["tasks"][name]
    return TaskSpec.model_validate({**section, "expected_questions": None})


def test_vsr_as_the_page_configures_it(tmp_path):
    """Statements about pictures, labels 0 and 1; the columns of `cambridgeltl/vsr_zeroshot`."""
    rows = [
        {"image": "1.png", "image_link": "http://x/1.png", "caption": "The cat is under the table."}
        | {"label": 1, "relation": "under", "subj": "cat", "obj": "table"},
        {"image": "2.png", "image_link": "http://x/2.png", "caption": "The cup is left of the box."}
        | {"label": 0, "relation": "left of", "subj": "cup", "obj": "box"},
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = spatial_task("vsr", tmp_path)
    first, second = read_questions(spec, source(tmp_path, tmp_path / "test.jsonl"))
    assert "The cat is under the table." in first.text and "True or False" in first.text
    assert (first.answers, second.answers) == (("True",), ("False",))
    assert (first.type, second.type) == ("under", "left of")
    score = METRICS[spec.metric].score
    assert [score("False.", item.answers, item.choices) for item in (first, second)] == [0, 1]


def test_whats_up_as_the_page_configures_it(tmp_path):
    """The first caption is the right one, so choices are asked in another order for each picture."""
    places = ["on", "under", "left of", "right of"]
    rows = [
        {"image_path": f"data/controlled_images/{i % 2 + 1}.png"}
        | {"caption_options": [f"A cup {place} chair {i}" for place in places]}
        for i in range(12)
    ]
    (tmp_path / "c.json").write_text(json.dumps(rows))
    spec = spatial_task("whatsup", tmp_path)
    asked = read_questions(spec, source(tmp_path, tmp_path / "c.json"))
    assert all(item.choices["ABCD".index(item.answers[0])].startswith("A cup on") for item in asked)
    assert len({item.answers for item in asked}) > 2
    assert [item.choices for item in asked] == [
        item.choices for item in read_questions(spec, source(tmp_path, tmp_path / "c.json"))
    ]
    assert f"{asked[0].answers[0]}. A cup on chair 0" in asked[0].text
    score = METRICS[spec.metric].score
    assert [score(item.answers[0], item.answers, item.choices) for item in asked] == [1] * 12
    with TABLE.pictures(source(tmp_path, tmp_path / "c.json"), spec.fields, asked) as shown:
        assert shown(asked[0].image) == picture(1)


def test_columns_that_need_choices_say_so():
    with pytest.raises(ValueError, match="answer: null without choices; name the column with the choices"):
        FieldsSpec(answer=None)


def test_answers_of_ten_people_are_kept(tmp_path):
    people = [{"answer": "red", "answer_id": i} for i in range(10)]
    (tmp_path / "v.json").write_text(json.dumps([{"question": "?", "image": "1.png", "answer": people}]))
    [found] = TABLE.read(source(tmp_path, tmp_path / "v.json"), FieldsSpec())
    assert found.answers == ("red",) * 10


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[]", "no questions of kind: table"),
        ("a.json", '{"a": 1}', r"a\.json: no list of records"),
        ("a.jsonl", '{"q": "?", "a": "x", "file": "1.png"}\nx\n', r"a\.jsonl, line 2: no JSON object"),
        (
            "a.csv",
            "q,a,file\n?,yes,\n",
            r"a\.csv, record 1: no 'file', which fields\.picture names; columns: q, a",
        ),
        ("a.csv", "question,a,file\n", "no questions"),
        ("a.json", '[{"question": "?", "a": "yes", "file": "1.png"}]', "no 'q', which fields.question names"),
        ("a.json", '[{"q": "?", "a": "yes", "file": 7}]', r"7, which is no picture and no name of one"),
        ("a.txt", "?", r"a\.txt: kind: table reads \.json, \.jsonl, \.csv, \.parquet"),
    ],
)
def test_what_is_no_table_of_questions_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    fields = FieldsSpec(question="q", answer="a", picture="file")
    spec = TaskSpec(source="mine", kind="table", fields=fields)
    with pytest.raises(UserError, match=message):
        read_questions(spec, source(tmp_path, tmp_path / name))


def test_an_answer_that_is_no_choice_is_named(tmp_path):
    write(tmp_path / "q.json", [{**RECORDS[0], "a": 2}])
    with pytest.raises(UserError, match="the answer 2 is no place among 2 choices"):
        TABLE.read(source(tmp_path, tmp_path / "q.json"), FieldsSpec(**FIELDS))


def test_fields_and_kind_go_together():
    with pytest.raises(ValueError, match="kind: table needs fields; add fields"):
        TaskSpec(source="s", kind="table")
    with pytest.raises(ValueError, match="kind: shapes takes no fields; remove them or set kind: table"):
        TaskSpec(source="s", fields=FieldsSpec())
