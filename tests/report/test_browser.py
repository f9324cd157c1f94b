"""The report in a real browser: on a phone, on a desktop, in the dark and in print nothing is clipped,
nothing scrolls sideways, all can be read and heard.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas
import pytest
from PIL import Image

from tests.report.conftest import answered, rendered
from workflow_scripts.io import read_json, write_json

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium"),
]
PHONE, DESKTOP, PAPER = 390, 1280, 688  # pixels; A4 between its margins
LIGHT, DARK = ("--blink-settings=preferredColorScheme=1",), ("--blink-settings=preferredColorScheme=0",)

LOOK = Path(__file__).with_name("look.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with every part: names that are long, numbers of others, disagreements, diagnostics."""
    folder, names = tmp_path_factory.mktemp("page"), ["vanilla", "normalize_multilayer_compress_256"]
    paths = []
    for place, name in enumerate(names):
        paths.append(answered(folder, name, range(10 if place else 4)))
        content = read_json(paths[-1])
        write_json(paths[-1], content | {"scored": content["scored"] | {"benchmark": "pope"}})
        layers = [(layer, None, measure) for layer in range(4) for measure in ("norm_vision", "norm_text")]
        layers += [(layer, None, f"permuted_{key}") for layer in range(4) for key in ("logit", "token")]
        heads = ("cmb", "entropy", "rope_logit", "rope_attention")
        layers += [(layer, head, key) for layer in (1, 2, 3) for head in range(4) for key in heads]
        table = pandas.DataFrame(layers, columns=["layer", "head", "measure"]).astype({"head": "Int64"})
        home = folder / "experiments" / name
        table.assign(value=0.3 + 0.5 * place, count=5).to_parquet(home / "measures.parquet")
        about = {"experiment": name, "diagnostics": {"shapes": {"prompts": 5, "table": "measures.parquet"}}}
        checkpoint = {"experiment": name, "description": "LLaVA as it is", "runs": {"export": "x"}}
        flags = {"interventions": {"compression_after_projection": True}, "paths": {"hf": "x"}}
        checkpoint |= flags | {"loads_with": {"hf": ["transformers"]}, "digest": "d"}
        write_json(home / "diagnostics.json", about)
        write_json(home / "checkpoint.json", checkpoint)
        paths += [home / "diagnostics.json", home / "checkpoint.json"]
    text = rendered(paths, folder)
    for part in ("Where experiments disagree", "Published by others", 'id="diagnostics"', 'id="experiments"'):
        assert part in text
    return folder / "report" / "index.html"


def browse(*arguments):
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    done = subprocess.run(
        [BROWSER, *options, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def looked_at(path, width, scheme, medium="screen"):
    """What is wrong with the page in a window of that width: a copy that may run a script, since the page
    itself forbids that.
    """
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text(encoding="utf-8"))
    if medium == "print":
        text = text.replace("@media print", "@media all")
    text = text.replace("<details", "<details open")
    copy = path.with_name(f"looked-at-{medium}.html")
    copy.write_text(text.replace("</body>", f"<script>{LOOK}</script></body>"), encoding="utf-8")
    said = browse(*scheme, f"--window-size={width},900", "--dump-dom", copy.as_uri())
    [found] = re.findall(r'data-found="([^"]*)"', said)
    return json.loads(html.unescape(found))


@pytest.mark.parametrize(
    ("width", "scheme", "medium"),
    [
        (PHONE, LIGHT, "screen"),
        (DESKTOP, DARK, "screen"),
        (PAPER, LIGHT, "print"),
    ],
)
def test_nothing_is_clipped_and_all_can_be_read(page, width, scheme, medium):
    seen = looked_at(page, width, scheme, medium)
    assert seen["found"] == []
    assert seen["words"] > 100, "a blank page has no faults either"


def test_faults_are_found(page):
    """What the test above looks for is seen where it is there."""
    path = page.with_name("spoilt.html")
    wrong = (
        '<p style="width: 900px; color: #ccc">too wide and too pale</p><img src="data:,"><table><th>x</table>'
    )
    path.write_text(page.read_text().replace("</main>", wrong + "</main>"))
    found = " ".join(looked_at(path, PHONE, LIGHT)["found"])
    for words in (
        "wider than the window",
        "beyond the edge: too wide",
        "contrast",
        "img without alt",
        "th without",
    ):
        assert words in found


def test_pictures_of_it_are_not_blank(page, tmp_path):
    for width in (PHONE, DESKTOP):
        browse(f"--window-size={width},2400", f"--screenshot={tmp_path / 'page.png'}", page.as_uri())
        with Image.open(tmp_path / "page.png") as picture:
            assert picture.width == width
            thirds = [picture.crop((0, top, width, top + 800)) for top in range(0, 2400, 800)]
            colours = [len(third.convert("RGB").getcolors(1 << 20)) for third in thirds]
        assert min(colours) > 50, "the page goes on, with figures and pictures"


def test_it_prints_on_several_pages(page, tmp_path):
    browse("--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}", page.as_uri())
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF-") and 2 <= len(re.findall(rb"/Type /Page\b(?!s)", content)) <= 12
