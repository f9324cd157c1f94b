"""Conversations at random, from an annotation file to the ids of a training: each record is encoded, counted
by a policy, or named in a message of ours.
"""

import contextlib
import json
import re

import pytest
from hypothesis import strategies as st

from llava_ext.data.dataset import EncodedSamples
from llava_ext.data.record_kinds import KINDS
from llava_ext.data.samples import SamplesError, open_samples
from llava_ext.data.templates import TEMPLATES
from llava_ext.errors import TrainingError
from tests.merge.test_merge import GOOD
from tests.support.families import llama3_tokenizer
from tests.support.fuzzing import RECORD, changed, tries
from tests.support.mixing import LOOSE, DataFolder
from workflow_scripts.io import UserError

TOKENIZER = llama3_tokenizer()
POLICY = st.fixed_dictionaries({name: st.sampled_from(kind.actions) for name, kind in KINDS.items()})
RECORDS = st.lists(RECORD.flatmap(changed) | RECORD, min_size=1, max_size=8)
# What may stand in a file without being a record or JSON at all.
JUNK = st.sampled_from(
    [b"", b"[", b"]", b",", b"\xff", b"NaN", b"\xef\xbb\xbf", b"{}", b"\0", b'"', b"1e999"]
)
NO_CAPTION = re.compile(r"`plain` needs two turns|\d+ <image> .* for 0 pictures")
DROP = LOOSE | {"malformed": "drop"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sources with pictures `a.jpg` and `b/a.jpg`, and annotations that each example replaces."""
    folder = DataFolder(tmp_path_factory.mktemp("conversations"))
    folder.images("pics", "folder", {"a.jpg": GOOD["0.jpg"], "b/a.jpg": GOOD["1.jpg"]})
    folder.annotations("notes", [])
    return folder


def check_encoding(store):
    """Every record of the store is encoded by every template; only `plain` may refuse, with its reason."""
    for version in TEMPLATES:
        samples = EncodedSamples(store, TOKENIZER, version, 512, lambda data, tolerant: data)
        for index in range(len(samples)):
            try:
                encoded = samples.text(index)
            except TrainingError as error:
                assert version == "plain" and NO_CAPTION.search(str(error)), error
                continue
            assert len(encoded.input_ids) == len(encoded.labels) > 0
            assert encoded.input_ids.count(-200) in (0, len(store.image_bytes(index)))


def as_file(records, junk, at):
    """The records as JSON, perhaps with something between them that does not belong there."""
    data = json.dumps(records).encode()
    place = at % (len(data) + 1)
    return data[:place] + junk + data[place:]


@tries(20, 40, records=RECORDS, policy=POLICY)
@pytest.mark.parametrize("policy_says", ["as it is", "at random"])
def test_what_the_merge_leaves_is_trained_on(folder, policy_says, records, policy):
    (folder.path / "notes.json").write_text(json.dumps(records))
    actions = {} if policy_says == "as it is" else {"records": policy}
    part = {
        "annotations": "notes",
        "images": [{"source": "pics"}],
        "policy": DROP | actions,
    }
    try:
        manifest = folder.mix(part)
    except UserError as error:
        assert str(error).strip()
        return
    [report] = manifest["parts"]
    assert report["records"] == len(records) == report["kept"] + sum(report["dropped"].values())
    check_encoding(open_samples(folder.mixture))


@tries(60, 120, records=RECORDS, junk=JUNK, at=st.integers(0, 2**16))
def test_a_plain_file_is_trained_on_or_refused_by_name(folder, records, junk, at):
    path = folder.path / "plain.json"
    path.write_bytes(as_file(records, junk, at))
    try:
        store = open_samples(path, folder.path / "pics")
    except SamplesError as error:
        assert str(path) in str(error)
        return
    for index in range(len(store)):
        with contextlib.suppress(SamplesError):  # a picture that is not there
            store.image_bytes(index)
    check_encoding(Pictureless(store))


class Pictureless:
    """A store whose pictures are names only: whether they exist is not asked here."""

    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(self.store)

    def __getattr__(self, name):
        return getattr(self.store, name)

    def image_bytes(self, index):
        return self.store._names(index)


@tries(20, 40, records=RECORDS, junk=JUNK, at=st.integers(0, 2**16))
def test_a_damaged_file_of_records_is_read_or_named(folder, records, junk, at, capsys):
    """The file as a source of its own, through the step that fetches and checks it, and the merge."""
    path = folder.path / "odd.json"
    path.write_bytes(as_file(records, junk, at))
    try:
        folder.source("odd", {"kind": "path", "annotations": str(path)})
        folder.mix({"annotations": "odd", "images": [{"source": "pics"}], "policy": DROP})
    except SystemExit:
        said = capsys.readouterr().err
        assert "error: " in said and "Traceback" not in said
    except UserError as error:
        assert str(error).strip()
