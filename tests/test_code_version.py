"""The number that names the training code is raised when results change; this test asks for the decision."""

import shutil

from tests.support.rerun_rows import ROWS
from tests.support.workspace import ROOT
from workflow_scripts import code_version


def test_the_recorded_digest_belongs_to_the_present_code():
    present = code_version.code_digest(ROOT)
    assert present == code_version.CODE_DIGEST, (
        "the code that makes the numbers has changed. Does the same configuration now give other results?"
        " Then raise CODE_VERSION in workflow_scripts/code_version.py. In both cases record the decision:"
        " python -m workflow_scripts.code_version --update"
    )


def test_comments_docstrings_and_line_breaks_are_no_change(tmp_path):
    for name in code_version.NUMERIC:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    before = code_version.code_digest(tmp_path)
    path = tmp_path / "llava_ext/data/images.py"
    path.write_text("# a remark\n" + path.read_text().replace('"""', '"""Also: ', 1) + "\n\n# the end\n")
    assert code_version.code_digest(tmp_path) == before
    path.write_text(path.read_text() + "\nchanged = 1\n")
    assert code_version.code_digest(tmp_path) != before


def test_every_numeric_module_exists():
    assert [name for name in code_version.NUMERIC if not (ROOT / name).is_file()] == []


def test_the_table_of_reruns_has_every_tested_row():
    page = (ROOT / "docs/reruns.md").read_text()
    cells = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    for row in ROWS:
        assert any(cell.startswith(row) for cell in cells), row
