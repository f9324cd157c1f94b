"""Odd records in a mixture: policies, counts, examples, bytes."""

from __future__ import annotations

import json

import pytest

from llava_ext.data.samples import open_samples
from tests.merge.test_merge import GOOD, part
from tests.support.mixing import LOOSE, DataFolder, conversation
from tests.support.pictures import seen_otherwise
from workflow_scripts.config.mixtures import MixtureSpec, Policy
from workflow_scripts.inspect import as_text, overview
from workflow_scripts.io import UserError, read_json
from workflow_scripts.plan.specs import recipe

CHAT = {"messages": [{"role": "user", "content": "<image>\nwhat"}, {"role": "assistant", "content": "é"}]}
SYSTEM = {
    "id": "s",
    "conversations": [
        {"from": "system", "value": "short"},
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"},
    ],
}
TOOL = {"id": "t", "conversations": [{"from": "human", "value": "a"}, {"from": "tool", "value": "b"}]}


@pytest.fixture
def folder(tmp_path):
    folder = DataFolder(tmp_path)
    folder.images("pics", "zip", GOOD)
    return folder


def test_records_of_other_forms_are_written_as_llava_has_them(folder):
    odd = CHAT | {"id": 7, "images": ["./3.jpg"]}
    folder.annotations("notes", [conversation("0.jpg", id=0), odd, conversation("2.jpg", id=2)])
    report = folder.mix(part())["parts"][0]
    store = open_samples(folder.mixture)
    assert store.record(1) == {
        "id": 7,
        "conversations": [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "é"}],
        "image": ["3.jpg"],
    }
    assert store.image_bytes(1) == [GOOD["3.jpg"]]
    assert store.record(0) == conversation("0.jpg", id=0)
    assert report["findings"] == {
        kind: {"action": "fix", "count": 1} for kind in ("other_keys", "role_names", "images_key", "dot_path")
    }
    assert report["examples"]["fixed: dot_path"] == [
        {"record": "notes.json, record 2", "id": 7, "detail": "./3.jpg"}
    ]


def test_nothing_is_said_about_records_that_are_in_order(folder):
    folder.annotations("notes", [conversation(f"{i}.jpg", id=i) for i in range(10)])
    report = folder.mix(part())["parts"][0]
    assert "findings" not in report
    assert report["examples"] == {}


def test_each_action_is_counted_with_examples(folder):
    folder.annotations("notes", [conversation("0.jpg"), SYSTEM, TOOL])
    report = folder.mix(part(policy=LOOSE))["parts"][0]
    assert report["dropped"] == {"unknown_role": 1}
    assert report["findings"]["system_turn"] == {"action": "keep", "count": 1}
    assert report["examples"]["kept: system_turn"][0]["record"] == "notes.json, record 2"
    assert report["examples"]["unknown_role"][0] == {
        "record": "notes.json, record 3", "id": "t", "detail": "'tool'"
    }  # fmt: skip
    assert report["used"] == 2
    fixed = folder.mix(part(policy=LOOSE | {"records": {"system_turn": "fix"}}))
    assert len(open_samples(folder.mixture).record(1)["conversations"]) == 2
    assert fixed["parts"][0]["findings"]["system_turn"]["action"] == "fix"


def test_fail_names_file_record_id_and_the_policys_key(folder):
    folder.annotations("notes", [conversation("0.jpg"), conversation("/data/1.jpg", id="abs")])
    with pytest.raises(UserError) as error:
        folder.mix(part())
    message = str(error.value)
    assert "notes.json, record 2 (id 'abs'): an absolute path of an image: /data/1.jpg" in message
    assert "absolute_path: fix, drop, fail" in message
    policy = {"records": {"absolute_path": "fix"}}
    images = [{"prefix": "data", "source": "pics"}, {"source": "pics"}]
    folder.mix({"annotations": "notes", "images": images, "policy": policy})
    assert open_samples(folder.mixture).image_bytes(1) == [GOOD["1.jpg"]]


def test_too_many_dropped_records_name_their_kinds(folder):
    folder.annotations("notes", [conversation("0.jpg"), TOOL])
    with pytest.raises(UserError, match=r"50.00%\) would be dropped \(1 unknown_role\)") as error:
        folder.mix(part())
    assert "unknown_role: notes.json, record 2" in str(error.value)


def test_several_pictures_need_as_many_placeholders(folder):
    two = conversation(["0.jpg", "1.jpg"], id=0)
    lacking = json.loads(json.dumps(two).replace("<image>\\n<image>", "<image>"))
    folder.annotations("notes", [two, lacking])
    manifest = folder.mix(part(policy=LOOSE))
    assert (manifest["records"], manifest["images"]) == (1, 2)
    assert manifest["parts"][0]["dropped"] == {"fewer_placeholders": 1}
    folder.mix(part(policy={"records": {"fewer_placeholders": "fix"}}))
    assert open_samples(folder.mixture).record(1) == two


def test_inspect_shows_findings(folder):
    folder.annotations("notes", [conversation("0.jpg"), SYSTEM])
    folder.mix(part())
    shown = as_text(overview(open_samples(folder.mixture)))
    assert "kept: system_turn: notes.json, record 2" in shown


def test_a_policy_that_says_the_default_is_no_change():
    said = {"parts": [{"annotations": "notes", "policy": {"records": {"system_turn": "keep"}}}]}
    unsaid = {"parts": [{"annotations": "notes"}]}
    assert recipe(MixtureSpec.model_validate(said)) == recipe(MixtureSpec.model_validate(unsaid))
    assert Policy.model_validate({"records": {"video": "keep"}}).records == {"video": "keep"}


def test_equal_inputs_give_equal_bytes_also_where_records_are_mended(folder):
    folder.annotations("notes", [CHAT | {"image": f"{i}.jpg"} for i in range(10)])
    first = folder.mix(part(weight=0.5))
    again = folder.mix(part(weight=0.5))
    assert first == again == read_json(folder.mixture / "manifest.json")


def test_pictures_that_training_sees_otherwise_are_counted_and_shown(folder):
    odd = seen_otherwise()
    folder.images(
        "odd", "zip", {"plain.jpg": GOOD["0.jpg"]} | {name: data for name, (data, _) in odd.items()}
    )
    folder.annotations(
        "notes", [conversation(name, id=name) for name in ("plain.jpg", "turned.png", "gray16.png")]
    )
    manifest = folder.mix({"annotations": "notes", "images": [{"source": "odd"}]})
    [report] = manifest["parts"]
    assert report["seen_otherwise"] == {"sixteen_bit": 1, "rotated": 1}
    assert report["examples"]["kept: rotated"] == [
        {
            "record": "notes.json, record 2",
            "id": "turned.png",
            "image": "turned.png",
            "detail": "odd: EXIF orientation 6: seen as it is stored, neither turned nor mirrored",
        }
    ]
    assert "kept: sixteen_bit: notes.json, record 3" in as_text(overview(open_samples(folder.mixture)))
