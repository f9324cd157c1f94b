"""Model folders are prepared on a copy: weights linked or made safe, the generation config mended, saving
proven.
"""

import json
import os
import pickle
import subprocess
import sys

import pytest

from tests.support import warm_python
from tests.support.servers import HubServer
from tests.support.workspace import ROOT

pytestmark = pytest.mark.slow

BROKEN = {
    "temperature": 0.9,
    "top_p": 0.6,
    "max_length": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory):
    """A folder like Vicuna's: two .bin shards, only a sentencepiece tokenizer, a generation config that
    can't be saved.
    """
    import sentencepiece
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("vicuna")
    text = folder / "text.txt"
    text.write_text(
        "\n".join(
            f"A picture of {n} cats and {n} dogs. USER: What is it? ASSISTANT: A cat." for n in range(300)
        )
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=120,
        model_type="bpe",
        byte_fallback=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    for name in ("text.txt", "tokenizer.vocab"):
        (folder / name).unlink()
    sizes = {
        "vocab_size": 128,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.config.save_pretrained(folder)
    state = model.state_dict()
    names = list(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[:4], "pytorch_model-00002-of-00002.bin": names[4:]}
    for shard, part in shards.items():
        torch.save({name: state[name] for name in part}, folder / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "generation_config.json").write_text(json.dumps(BROKEN))
    tokenizer = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "add_bos_token": True}))
    return folder


def prepare(spec, folder, **environment):
    """The step; what the hub's client reads from the environment it reads while it is loaded."""
    command = [
        sys.executable if environment else warm_python.python(),
        "-m",
        "workflow_scripts.prepare_model",
        "--name",
        "m",
        "--spec",
        json.dumps(spec),
    ]
    done = subprocess.run(
        [*command, "--manifest", str(folder / "manifest.json")],
        cwd=ROOT,
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_a_vicuna_like_folder_is_mended_on_a_copy(vicuna, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

    before = {path.name: path.read_bytes() for path in vicuna.iterdir()}
    spec = {"kind": "path", "role": "llm", "path": str(vicuna)}
    done = prepare(spec, tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["patched"] == ["generation_config.json: do_sample = true"]
    model = tmp_path / "model"
    assert not list(model.glob("*.bin"))
    assert {path.name: path.read_bytes() for path in vicuna.iterdir()} == before, "the original was changed"
    # the whole point: what stage 2 saves in the end can be saved
    loaded = LlamaForCausalLM.from_pretrained(model)
    loaded.save_pretrained(tmp_path / "saved")
    GenerationConfig.from_pretrained(tmp_path / "saved").validate(strict=True)
    assert AutoTokenizer.from_pretrained(model)("A cat.")["input_ids"][0] == 1
    with pytest.raises(ValueError):
        GenerationConfig.from_pretrained(vicuna).validate(strict=True)

    again = prepare(spec, tmp_path)
    assert again.returncode == 0
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest, (
        "the same model is the same manifest"
    )


def test_converted_weights_are_equal(vicuna, tmp_path):
    import torch
    from safetensors.torch import load_file

    from workflow_scripts.prepare_model.step import convert_shards

    convert_shards({path.name: path for path in vicuna.glob("*.bin")}, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for path in vicuna.glob("*.bin"):
        for name, tensor in torch.load(path, weights_only=True).items():
            assert torch.equal(load_file(tmp_path / index[name])[name], tensor)


def test_weights_stay_in_the_mapped_file_until_they_are_written(tmp_path):
    """A shard of 10 GB needs no 10 GB of memory; only what shares memory is copied, which safetensors
    refuses otherwise.
    """
    import torch

    from workflow_scripts.prepare_model.step import _without_shared_memory

    whole = torch.arange(12.0)
    torch.save(
        {"own": torch.ones(3, 4), "tied": whole, "tie": whole, "part": whole[4:8]}, tmp_path / "shard.bin"
    )
    state = torch.load(tmp_path / "shard.bin", weights_only=True, mmap=True)
    found = _without_shared_memory(state)
    assert {name: found[name].data_ptr() == state[name].data_ptr() for name in found} == {
        "own": True,
        "tied": True,
        "tie": False,
        "part": False,
    }
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert len({item.untyped_storage().data_ptr() for item in found.values()}) == 4


class Harmful:
    def __reduce__(self):
        return (os.system, ("touch harmed",))


def test_code_inside_weights_is_not_run(vicuna, tmp_path, monkeypatch):
    from workflow_scripts.io import UserError
    from workflow_scripts.prepare_model.step import convert_shards

    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.bin").write_bytes(pickle.dumps({"weight": Harmful()}))
    with pytest.raises(UserError, match="can't be read as plain weights"):
        convert_shards({"evil.bin": tmp_path / "evil.bin"}, tmp_path)
    assert not (tmp_path / "harmed").exists()


def test_a_model_of_the_hub_is_fetched_at_its_commit_without_what_is_ignored(vicuna, tmp_path):
    with HubServer("lmsys/tiny", "model").running() as hub:
        for path in vicuna.iterdir():
            hub.put(path.name, path.read_bytes(), lfs=path.suffix == ".bin")
        hub.put("flax_model.msgpack", b"x" * 1000)
        spec = {"kind": "hub", "role": "llm", "repo": hub.repo, "revision": hub.commit}
        done = prepare(spec, tmp_path / "a", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
        assert done.returncode == 0, done.stderr
        assert not any("flax" in request[1] for request in hub.requests if "/resolve/" in request[1])
    local = prepare({"kind": "path", "role": "llm", "path": str(vicuna)}, tmp_path / "b")
    assert local.returncode == 0
    first, second = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in "ab")
    assert first["revision"] and first["digest"] == second["digest"], (
        "the same content from two places is the same model"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: [path.unlink() for path in folder.glob("*.bin")], "no weights"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "could not be used or saved"),
        (lambda folder: (folder / "config.json").write_text("{"), "could not be used or saved"),
        (
            lambda folder: (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK"),
            "can't be read as plain weights",
        ),
    ],
    ids=["no config", "no weights", "no tokenizer", "broken config", "broken shard"],
)
def test_a_folder_that_would_fail_later_is_refused_now(vicuna, tmp_path, damage, message):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(vicuna, copy)
    damage(copy)
    done = prepare({"kind": "path", "role": "llm", "path": str(copy)}, tmp_path / "out")
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "out/manifest.json").exists()


def test_safetensors_are_linked_not_copied(tmp_path):
    from workflow_scripts.prepare_model.step import choose_files, copy_model

    origin = tmp_path / "snapshot"
    origin.mkdir()
    (tmp_path / "blob").write_bytes(b"weights")
    (origin / "model.safetensors").symlink_to(tmp_path / "blob")
    (origin / "pytorch_model.bin").write_bytes(b"the same in the old format")
    (origin / "config.json").write_text("{}")
    names = choose_files(sorted(path.name for path in origin.iterdir()), ())
    assert names == ["config.json", "model.safetensors"]
    target = tmp_path / "target"
    target.mkdir()
    copy_model(((origin / name, name) for name in names), target)
    assert (target / "model.safetensors").stat().st_ino == (tmp_path / "blob").stat().st_ino
    assert (target / "config.json").stat().st_ino != (origin / "config.json").stat().st_ino
