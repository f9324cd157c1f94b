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
        (
            "a.json",
            '[{"q": "?", "a": "yes", "file": ["1.png", "2.png"]}]',
            "asks about 2 pictures; questions",
        ),
        ("a.json", '[{"q": "?", "a": [" "], "file": "1.png"}]', "no 'a', which fields.answer names"),
        ("a.json", '[{"q": "?", "a": NaN, "file": "1.png"}]', "no 'a', which fields.answer names"),
        ("a.json", '[{"q": "?", "a": "yes",', r"a\.json: not valid JSON .*; correct it"),
        ("a.jsonl", "[1]\n", r"a\.jsonl, line 1: no JSON object but '\[1\]'; correct it"),
        ("a.jsonl", "5\n", r"line 1: no JSON object but '5'"),
        ("a.csv", "q,a,file\nred, or blue?,red,1.png\n", "line 2: more cells than columns; put texts with"),
        ("a.csv", 'q,a,file\n"red?,red,1.png\n', "after line 1: unexpected end of data; correct the quotes"),
        ("a.csv", "q,a,a,file\n?,yes,no,1.png\n", "has more than one column 'a'; rename or remove one"),
        ("a.json", '[{"q": "?", "a": [{"text": "x"}], "file": "1.png"}]', "is no text and no list of texts"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet: can't be read as parquet"),
        ("a.csv", b"q,a,file\nCaf\xe9?,yes,1.png\n", r"a\.csv: is not in UTF-8 .*; save it so"),
        ("a.txt", "?", r"a\.txt: kind: table reads \.json, \.jsonl, \.csv, \.parquet"),
    ],
)
def test_what_is_no_table_of_questions_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    fields = FieldsSpec(question="q", answer="a", picture="file")
    spec = TaskSpec(source="mine", kind="table", fields=fields)
    with pytest.raises(UserError, match=message):
        read_questions(spec, source(tmp_path, tmp_path / name))


def table_of(folder, name, content, **columns):
    """The questions of a file with these contents."""
    (folder / name).write_bytes(content.encode())
    return TABLE.read(source(folder, folder / name), FieldsSpec(**columns))


def test_other_ends_of_lines_are_part_of_a_text(tmp_path):
    record = {"question": "a\u2028b\x85c?", "answer": "yes", "image": "1.png", "more": {"x": [1]}}
    [found] = table_of(tmp_path, "q.jsonl", json.dumps(record, ensure_ascii=False) + "\r\n")
    assert found.text == record["question"]


def test_quotes_lines_and_a_byte_order_mark_of_csv_are_read(tmp_path):
    [found] = table_of(tmp_path, "q.csv", '\ufeffquestion,answer,image\n"Is ""a, b""\nred?",yes,1.png\n')
    assert found.text == 'Is "a, b"\nred?'


def test_a_list_of_one_picture_is_that_picture(tmp_path):
    rows = [{"question": "?", "answer": "yes", "image": [{"bytes": picture(5), "path": None}]}]
    pd.DataFrame(rows).to_parquet(tmp_path / "test.parquet")
    manifest = source(tmp_path, tmp_path / "test.parquet", images=False)
    asked = TABLE.read(manifest, FieldsSpec())
    with TABLE.pictures(manifest, FieldsSpec(), asked) as shown:
        assert shown(asked[0].image) == picture(5)


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        ('["cat", "dog"]', "1", "B"),  # all is text in CSV
        ('["1", "2"]', "2", "2"),  # a choice itself, not its place
        ('{"A": "cat", "B": "dog", "C": ""}', "B", "B"),
    ],
)
def test_right_choices_of_csv(tmp_path, choices, answer, right):
    path = tmp_path / "q.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([["question", "answer", "image", "c"], ["?", answer, "1.png", choices]])
    [found] = TABLE.read(source(tmp_path, path), FieldsSpec(choices="c"))
    assert found.answers == (right,)
    assert METRICS["choice_letter"].score("B", found.answers, found.choices) == 1
    assert len(found.choices) == 2


def test_numbers_with_a_point_are_places_and_numbers_again(tmp_path):
    """As tables hold whole numbers in a column with gaps."""
    record = {"question": "?", "answer": 1.0, "image": "1.png", "c": ["cat", "dog"]}
    assert table_of(tmp_path, "a.json", json.dumps([record]), choices="c")[0].answers == ("B",)
    assert table_of(tmp_path, "b.json", json.dumps([record]))[0].answers == ("1",)


@pytest.mark.parametrize("answer", [1, "B", "(b)", "B.", "dog"])
def test_shuffled_choices_take_the_right_answer_with_them(tmp_path, answer):
    """However it is written."""
    record = {"question": "?", "answer": answer, "image": "1.png", "c": ["cat", "dog", "cup"]}
    asked = table_of(tmp_path, "q.json", json.dumps([record] * 9), choices="c", shuffle_choices=True)
    assert len({item.choices for item in asked}) > 2
    score = METRICS["choice_letter"].score
    assert all(score("dog", item.answers, item.choices) == 1 for item in asked)
    assert not any(score("cat", item.answers, item.choices) for item in asked)


def test_strata_that_are_whole_numbers_are_so_with_a_point_too(tmp_path):
    records = [{"question": "?", "answer": "x", "image": "1.png", "kind": kind} for kind in (1, 1.0)]
    assert {i.type for i in table_of(tmp_path, "q.json", json.dumps(records), stratum="kind")} == {"1"}


@pytest.mark.parametrize("choices", ["cat|dog", ["cat"], list(map(str, range(27)))])
def test_what_is_no_list_of_choices_is_named(tmp_path, choices):
    record = {"question": "?", "answer": "A", "image": "1.png", "c": choices}
    with pytest.raises(UserError, match=r"record 1: \d+ choices .* from 2 to 26 can be asked; write a list"):
        table_of(tmp_path, "q.json", json.dumps([record]), choices="c")


@pytest.mark.parametrize(
    ("metric", "answer"), [("yes_no", "1"), ("choice_letter", "the second"), ("choice_letter", "C")]
)
def test_a_right_answer_that_the_metric_can_not_read_is_named_before_anything_is_asked(
    tmp_path, metric, answer
):
    record = {"question": "?", "answer": answer, "image": "1.png", "c": ["cat", "dog"]}
    (tmp_path / "q.json").write_text(json.dumps([record]))
    columns = FieldsSpec(choices="c" if metric == "choice_letter" else None)
    spec = TaskSpec(source="mine", kind="table", metric=metric, fields=columns)
    with pytest.raises(
        UserError, match=f"question 1: metric: {metric} can't read the right answer '{answer}'"
    ):
        read_questions(spec, source(tmp_path, tmp_path / "q.json"))


@pytest.mark.parametrize(
    ("records", "task", "message"),
    [
        ([{}], {"prompt_prefix": "<image>\n"}, "question 1: <image> stands in '<image>.nWhat"),
        (
            [{"kind": "all"}, {"kind": "left"}],
            {},
            "question 1: its stratum is called 'all', as all questions",
        ),
    ],
)
def test_what_would_confuse_prompts_or_numbers_is_named(tmp_path, records, task, message):
    base = {"question": "What?", "answer": "x", "image": "1.png", "kind": "a"}
    (tmp_path / "q.json").write_text(json.dumps([base | record for record in records]))
    spec = TaskSpec(source="mine", kind="table", fields=FieldsSpec(stratum="kind"), **task)
    with pytest.raises(UserError, match=message):
        read_questions(spec, source(tmp_path, tmp_path / "q.json"))


def test_questions_of_one_name_get_others_that_are_not_taken(tmp_path):
    records = [
        {"question": "?", "answer": "x", "image": "1.png", "id": name} for name in ("a", "a#2", "a", "a")
    ]
    (tmp_path / "q.json").write_text(json.dumps(records))
    spec = TaskSpec(source="mine", kind="table", fields=FieldsSpec(name="id"))
    found = read_questions(spec, source(tmp_path, tmp_path / "q.json"))
    assert [item.name for item in found] == ["a", "a#2", "a#3", "a#4"]


def test_pictures_that_are_not_there_are_counted_and_named(tmp_path):
    records = [{"question": "?", "answer": "x", "image": name} for name in ("1.png", "é.png", "3.png")]
    (tmp_path / "q.json").write_text(json.dumps(records))
    manifest = source(tmp_path, tmp_path / "q.json")
    asked = TABLE.read(manifest, FieldsSpec())
    message = r"2 of 3 pictures .* not there: é\.png, 3\.png; there are: 1\.png, 2\.png\. Correct the names"
    with pytest.raises(UserError, match=message), TABLE.pictures(manifest, FieldsSpec(), asked):
        pass


def test_an_answer_that_is_no_choice_is_named(tmp_path):
    write(tmp_path / "q.json", [{**RECORDS[0], "a": 2}])
    with pytest.raises(UserError, match="the answer 2 is no place among 2 choices"):
        TABLE.read(source(tmp_path, tmp_path / "q.json"), FieldsSpec(**FIELDS))


def test_fields_and_kind_go_together():
    with pytest.raises(ValueError, match="kind: table needs fields; add fields"):
        TaskSpec(source="s", kind="table")
    with pytest.raises(ValueError, match="kind: shapes takes no fields; remove them or set kind: table"):
        TaskSpec(source="s", fields=FieldsSpec())
