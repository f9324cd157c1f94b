"""The tool that shows a mixture."""

from __future__ import annotations

import re

import pytest

from tests.support.damage import jpeg
from tests.support.mixing import LOOSE, DataFolder, conversation
from tests.support.pictures import encoded
from tests.support.trainings import GOLDEN
from workflow_scripts import inspect as tool

NASTY = "<script>alert('x')</script> & \"quotes\""


@pytest.fixture
def mixture(tmp_path):
    folder = DataFolder(tmp_path)
    folder.images(
        "pics", "zip", {f"{i}.jpg": encoded(seed=i) for i in range(8)} | {"cut.jpg": jpeg(0)[:-900]}
    )
    records = [conversation(f"{i}.jpg", NASTY, "w " * (i * 30), id=i) for i in range(8)]
    records += [
        conversation("cut.jpg", id="<b>cut</b>"),
        conversation("none.jpg"),
        conversation(None, "hi", "ho"),
    ]
    folder.annotations("notes", records)
    folder.mix({"annotations": "notes", "images": [{"source": "pics"}], "policy": LOOSE})
    return folder.mixture


def test_counts_lengths_and_damage_by_source(mixture, capsys):
    tool.main([str(mixture)])
    shown = capsys.readouterr().out
    rows = {
        line.split()[0]: line.split() for line in shown.splitlines() if line.startswith(("pics ", "notes "))
    }
    assert rows["pics"][1:3] == ["9", "90.0"]
    assert rows["pics"][4:7] == ["0", "9", "1"], "text only, images, damaged"
    assert rows["notes"][1] == rows["notes"][4] == "1"
    assert "11 records read, 1 dropped (9.09 %): 1 missing" in shown
    assert "none.jpg (not in pics)" in shown
    bars = [int(line.split()[1]) for line in shown.splitlines() if re.match(r"\s+\d+-\d+", line)]
    assert sum(bars) == 10


def test_the_page_stands_alone_and_trusts_no_text(mixture, tmp_path, capsys):
    page = tmp_path / "page.html"
    tool.main([str(mixture), "--html", str(page), "--samples", "100"])
    text = page.read_text()
    assert text.count("<div class=card>") == 10
    assert text.count('src="data:image/') == 9
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "&lt;b&gt;cut&lt;/b&gt;" in text
    assert "truncated; kept by the policy" in text
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_the_same_seed_shows_the_same_samples(mixture, tmp_path, capsys):
    pages = []
    for number, seed in enumerate((1, 1, 2)):
        tool.main(
            [str(mixture), "--html", str(tmp_path / f"{number}"), "--samples", "3", "--seed", str(seed)]
        )
        pages.append((tmp_path / f"{number}").read_text())
    assert pages[0] == pages[1] != pages[2]


def test_plain_json_works_too(mixture, tmp_path, capsys):
    copy = tmp_path / "copy.json"
    copy.write_bytes((mixture / "samples.json").read_bytes())
    tool.main([str(copy), "--image-folder", str(tmp_path)])
    assert "copy " in capsys.readouterr().out


def test_lengths_in_tokens(mixture, tmp_path, capsys):
    from workflow_scripts.config.shapes import ShapesLlm
    from workflow_scripts.demo.models import build

    build(ShapesLlm(), tmp_path / "model")
    capsys.readouterr()
    tool.main([str(mixture), "--tokenizer", str(tmp_path / "model")])
    shown = capsys.readouterr().out
    without = int(next(line for line in shown.splitlines() if line.startswith("pics ")).split()[-1])
    assert "lengths in tokens" in shown
    tool.main([str(mixture), "--tokenizer", str(tmp_path / "model"), "--image-tokens", "16"])
    shown = capsys.readouterr().out
    assert (
        int(next(line for line in shown.splitlines() if line.startswith("pics ")).split()[-1]) == without + 16
    )


def test_the_page_marks_what_has_a_label(mixture, tmp_path):
    """And says of samples that can't be encoded why."""
    page, llm = tmp_path / "page.html", str(GOLDEN / "llm")
    tool.main([str(mixture), "--html", str(page), "--samples", "100", "--tokenizer", llm])
    text = page.read_text()
    assert "<script" not in text
    heads = re.findall(r"(\d+) tokens, (\d+) with a label", text)
    assert len(heads) == 10 and all(0 <= int(labels) < int(tokens) for tokens, labels in heads)
    assert "USER: hi ASSISTANT:<mark>ho&lt;/s&gt;</mark>" in text
    assert "USER: &lt;image&gt;" in text and "0 with a label, masked whole by a mismatch" in text
    options = ["--tokenizer", llm, "--prompt-version", "plain", "--limit", "0"]
    tool.main([str(mixture), "--html", str(page), *options])
    assert "be encoded: prompt version `plain` needs two turns" in page.read_text()


def test_what_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path / "nothing")])
    assert "there is no such file" in capsys.readouterr().err
