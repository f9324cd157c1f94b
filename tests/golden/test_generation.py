"""Greedy answers: imported original checkpoints give the recorded ids, token by token."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from llava_ext.checkpoints import keys, tensors
from llava_ext.checkpoints.stored import load_model
from llava_ext.data.assembly import Collator
from llava_ext.data.conversation import prompt_ids
from llava_ext.data.images import ImagePreprocessor, decode
from llava_ext.model.build import build_model
from llava_ext.model.interventions import FIELD_NAMES, Interventions
from llava_ext.training.setup import load_projector

from . import reference

LOGITS = {"torch.float32": 1e-4, "torch.float16": 0.05}


def names(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / "generation").glob("*.json"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "recording" in metafunc.fixturenames:
        metafunc.parametrize("recording", names(reference.folder(metafunc.config)))


@cache
def model_of(root: Path, recording: str):
    """A whole checkpoint, or a stage-1 projector on the base LLM, as the file's name says."""
    variant, _, kind = recording.partition("_stage1_projector_on_base_llm")
    if not kind:
        variant = recording.split("_full")[0]
        folders = sorted((root / "checkpoint").iterdir())
        return load_model(next((folder for folder in folders if folder.name.endswith(variant)), folders[0]))
    flags = reference.read(root / "train" / f"{variant}_stage1.json")["argv"]
    interventions = Interventions.from_mapping({name: flags[name] for name in FIELD_NAMES if name in flags})
    parts = build_model(
        root / "llm", root / flags["vision_tower"], interventions, projector_type=flags["mm_projector_type"]
    )
    load_projector(parts[0], root / "train" / f"{variant}_stage1_mm_projector.bin")
    return parts


def batch_of(root: Path, result: dict, model, tokenizer, processor, aspect_ratio: str):
    """One prompt with its picture."""
    ids = prompt_ids(tokenizer, result["prompt"])
    assert ids == result["input_ids"]
    images = []
    if result["image"]:
        pixels = ImagePreprocessor.from_processor(processor, aspect_ratio)
        images = [pixels(decode(root / result["image"])).to(model.dtype)]
    return Collator.for_model(model.config, tokenizer)([{"input_ids": ids, "labels": ids, "images": images}])


def test_greedy_answers(root, recording, report_difference):
    recorded = reference.read(root / "generation" / f"{recording}.json")
    first = reference.arrays(root / "generation" / f"{recording}.npz")
    model, tokenizer, processor = model_of(root, recording)
    half = recorded["dtype"] == "torch.float16"
    model = model.eval().to(torch.float16 if half else torch.float32)
    longest = max(len(result["output_ids"]) for result in recorded["results"]) - 1
    for number, result in enumerate(recorded["results"]):
        batch = batch_of(root, result, model, tokenizer, processor, recorded["image_aspect_ratio"])
        for name in ("labels", "image_token_counts"):
            batch.pop(name, None)
        output = model.generate(
            **batch, do_sample=False, max_new_tokens=longest, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        new = output.sequences[0, batch["input_ids"].shape[1] :].tolist()
        theirs = result["output_ids"][1:]  # transformers 4.37 puts a BOS in front
        sure = next(
            (
                place
                for place, margin in enumerate(result["top1_minus_top2"])
                if margin < LOGITS[recorded["dtype"]]
            ),
            len(theirs),
        )
        assert new[:sure] == theirs[:sure], (recording, number, tokenizer.decode(new), result["text"])
        if sure == len(theirs):
            assert [token for token in new if token != 0] == theirs
        difference = reference.largest(output.scores[0][0].float(), first[f"first_step_logits_{number}"])
        report_difference(f"generation/{recording}", difference, LOGITS[recorded["dtype"]])
    model.to(torch.float32)


def test_the_tower_in_a_checkpoint_is_the_one_in_its_config(root):
    """Original checkpoints name their tower by a path that is relative to where they were trained."""
    folders = list((root / "checkpoint").glob("*")) if (root / "checkpoint").is_dir() else []
    if not folders:
        pytest.skip("this folder of vectors has no whole checkpoint")
    state = keys.state_from_original(tensors.read_folder(folders[0]))
    model, _, _ = load_model(folders[0])
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
