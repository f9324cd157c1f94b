"""Every recorded forward and backward pass: vision features, embeddings, logits, loss, gradients.

The recorded configuration is the published code's; ours reproduces it with ``published_behaviour``. Two flags
of that code are no flags here: `add_registers` (its registers are cut off again, so it must equal the model
without it) and `rearrange_image_features` (a fixed permutation of the vision tokens, reproduced with the
permutation hook).
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llava_ext.analysis.diagnostics import permuted_vision_tokens
from llava_ext.checkpoints import keys
from llava_ext.data.assembly import Collator, interleaved_block, published_coordinate_ids
from llava_ext.data.conversation import IMAGE_TOKEN_INDEX
from llava_ext.model.build import build_model
from llava_ext.model.interventions import FLAGS, InterventionError, Interventions

from . import reference

BOUND = 1e-4
UNLIMITED = 2048


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = reference.folder(metafunc.config)
    if "recording" in metafunc.fixturenames:
        found = reference.recordings(root)
        metafunc.parametrize("recording", found, ids=[Path(entry["file"]).stem for entry in found])
    if "attempt" in metafunc.fixturenames:
        index = reference.read(root / "model" / "index_fork.json")
        found = [
            entry for entry in index["attempts"] if entry.get("error") and entry["config"] in index["configs"]
        ]
        metafunc.parametrize("attempt", found, ids=[entry["config"] for entry in found])


# -- from a recording's description to our model ----------------------------------------------------------


def configuration(recording: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The configuration's name and settings; a recording's own name may add suffixes (`_maxlen12`,
    `_leftpad`, ...).
    """
    names = [name for name in recording["configs"] if recording["config"].startswith(name)]
    name = max(names, key=len)
    return name, recording["configs"][name]


def interventions_of(settings: dict[str, Any]) -> Interventions:
    """The recorded flags, meant as the published code means them."""
    flags = settings["flags"].get("args", {}) | settings["flags"].get("config", {})
    values = {name: value for name, value in flags.items() if name in FLAGS}
    if values.get("compression_after_projection"):
        values["final_spatial_size"] = flags["final_spatial_size"]
    if values.get("interleave") and "interleave_sparsity" in flags:
        values["interleave_sparsity"] = flags["interleave_sparsity"]
    if settings.get("hybrid"):
        values["twoD_vision_embedding"] = True
    return Interventions(**values, published_behaviour=bool(values))


@cache
def bare_model(root: Path, name: str, which: str, settings: str):
    """The model of a configuration with its recorded projector."""
    import json

    description = json.loads(settings)
    model, tokenizer, _ = build_model(
        root / "llm",
        root / description["tower"],
        interventions_of(description),
        projector_type=description.get("ptype", "mlp2x_gelu"),
        vision_feature_layer=description.get("layer", -2),
        vision_feature_select_strategy="full" if description.get("feat") == "cls_patch" else "default",
        attn_implementation="eager",
    )
    weights = keys.projector_from_original(load_file(root / "projectors" / f"{which}_{name}.safetensors"))
    model.model.multi_modal_projector.load_state_dict(weights, strict=True)
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    return model, tokenizer


def model_for(root: Path, recording: dict[str, Any]):
    import json

    name, settings = configuration(recording)
    return bare_model(root, name, recording["which"], json.dumps(settings, sort_keys=True))


def collator_for(model, tokenizer, recording: dict[str, Any]) -> Collator:
    """The collator with the recording's length limit and padding side."""
    limit = re.search(r"_maxlen(\d+)", recording["config"])
    collator = Collator.for_model(
        model.config,
        tokenizer,
        model_max_length=int(limit[1]) if limit else UNLIMITED,
        text_max_length=UNLIMITED,
        padding_side="left" if "_leftpad" in recording["config"] else "right",
    )
    forced = re.search(r"forced(\d+)", recording["config"])
    if forced:  # the recording changed the published code's constant, not its configuration
        chosen = model.config.interventions
        collator.block = interleaved_block(
            collator.image_token_id,
            model.config.tokens_per_image,
            int(forced[1]),
            lambda index: published_coordinate_ids(tokenizer, *chosen.coordinates(index, 0)),
        )
    return collator


def image_entries(
    root: Path, model, recording: dict[str, Any], recorded: dict[str, np.ndarray]
) -> list[torch.Tensor]:
    """The images that the reference was given, one entry per place it consumes.

    Where the recording says that an entry holds crops, which pictures they were is read off the recorded
    vision features.
    """
    batch = reference.arrays(root / "batches" / f"{recording['batch']}__{recording['tower']}.npz")
    images = list(torch.from_numpy(batch["images"]))
    if "crops" not in recording["config"]:
        return images
    with torch.no_grad():
        features = model.model._selected_features(
            model.model._tower_outputs(torch.stack(images), None), None, None
        )
    used = [
        int(torch.argmin((features - row).abs().amax((1, 2))))
        for row in torch.from_numpy(recorded["projector_in"])
    ]
    position, crops = (
        int(number) for number in re.search(r"imglist(\d+)crops", recording["config"]).expand(r"1 \1").split()
    )
    entries, used_images = [], [images[index] for index in used]
    while used_images:
        take = crops if len(entries) == position else 1
        entry, used_images = used_images[:take], used_images[take:]
        entries.append(torch.stack(entry) if take > 1 else entry[0])
    return entries


def samples_of(
    root: Path, recording: dict[str, Any], entries: list[torch.Tensor]
) -> tuple[list[dict[str, Any]], list[int]]:
    """Our samples, and for each of our images its index among all (flattened) images of the reference.

    The reference hands out images by a counter over the batch; a sample without a placeholder uses one up.
    """
    batch = reference.arrays(root / "batches" / f"{recording['batch']}__{recording['tower']}.npz")
    sizes = [entry.shape[0] if entry.ndim == 4 else 1 for entry in entries]
    starts = np.cumsum([0, *sizes])
    samples, used, counter = [], [], 0
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        placeholders = int((ids == IMAGE_TOKEN_INDEX).sum())
        own = list(range(counter, counter + placeholders))
        counter += max(placeholders, 1)
        samples.append({"input_ids": ids, "labels": labels, "images": [entries[index] for index in own]})
        used += [flat for index in own for flat in range(starts[index], starts[index + 1])]
    return samples, used


def published_order(settings: dict[str, Any], tokens: int) -> list[int] | None:
    """The published `rearrange_image_features`: 3x3 blocks, row by row, each row by row (quirk 33)."""
    if not settings["flags"].get("config", {}).get("rearrange_image_features"):
        return None
    side = round(tokens**0.5)
    places = [(row, column) for row in range(side) for column in range(side)]
    return [
        row * side + column
        for row, column in sorted(places, key=lambda at: (at[0] // 3, at[1] // 3, at[0] % 3, at[1] % 3))
    ]


# -- the comparison ---------------------------------------------------------------------------------------


def watch(model, seen: dict[str, Any]) -> list[Any]:
    """Hooks that keep what the recordings keep."""
    core = model.model

    def projector_in(module, args):
        seen.setdefault("projector_in", args[0].detach().cpu())

    def embeddings(module, args, kwargs):
        seen["inputs_embeds"] = kwargs["inputs_embeds"].detach().cpu()

    def rope(module, args, kwargs, output):
        seen["rope"] = [table.detach().cpu() for table in output]

    return [
        core.multi_modal_projector.register_forward_pre_hook(projector_in),
        core.language_model.register_forward_pre_hook(embeddings, with_kwargs=True),
        core.language_model.rotary_emb.register_forward_hook(rope, with_kwargs=True),
    ]


def run(root: Path, recording: dict[str, Any], recorded: dict[str, np.ndarray], device: str = "cpu"):
    """The model, which is back on the CPU with its gradients, its logits and loss, and what was seen."""
    model, tokenizer = model_for(root, recording)
    _, settings = configuration(recording)
    model.train()
    model.zero_grad(set_to_none=True)
    samples, used = samples_of(root, recording, image_entries(root, model, recording, recorded))
    batch = collator_for(model, tokenizer, recording)(samples)
    seen: dict[str, Any] = {"used": used, "batch": batch}
    handles = watch(model, seen)
    order = published_order(settings, model.config.tokens_per_image)
    given = {name: item.to(device) if torch.is_tensor(item) else item for name, item in batch.items()}
    model.to(device)
    try:
        with permuted_vision_tokens(model, order=order):
            output = model(**given)
        output.loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        model.cpu()
    return model, SimpleNamespace(logits=output.logits.cpu(), loss=output.loss.cpu()), seen


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where a pass is computed, in float32 throughout."""
    if request.param == "cuda":
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    return request.param


def test_recorded_pass(root, recording, device, report_difference):
    recorded = reference.arrays(root / recording["file"])
    model, output, seen = run(root, recording, recorded, device)
    name = Path(recording["file"]).stem
    batch, mask = seen["batch"], recorded["attention_mask"]

    assert (batch["attention_mask"].numpy() == mask).all()
    labels = np.where(recorded["labels"] == IMAGE_TOKEN_INDEX, -100, recorded["labels"])
    assert (batch["labels"].numpy() == labels).all()
    if "img_token_mask" in recorded:
        placeholders = (batch["input_ids"] == model.config.image_token_id).numpy()
        assert (placeholders == recorded["img_token_mask"].astype(bool))[mask].all()

    def compare(what: str, ours: Any, theirs: Any) -> None:
        report_difference(f"{name}: {what}", reference.largest(ours, theirs), BOUND)

    compare_vision(model, seen, recorded, compare)
    compare("inputs_embeds", seen["inputs_embeds"][torch.from_numpy(mask)], recorded["inputs_embeds"][mask])
    if "rope_cos" in recorded:
        for table, theirs in zip(seen["rope"], ("rope_cos", "rope_sin"), strict=True):
            for row in table:  # the published code has one table for the whole batch
                compare("rope", row, recorded[theirs])
    logits = output.logits.detach()
    compare("logits", logits[..., recorded["logits_cols"]][mask], recorded["logits_sub"][mask])
    compare("logsumexp", logits.logsumexp(-1)[mask], recorded["logits_logsumexp"][mask])
    if "logits" in recorded:
        compare("logits", logits[mask], recorded["logits"][mask])
    compare("loss", output.loss.detach(), recorded["loss"])
    compare_gradients(model, recorded, compare)


def compare_vision(model, seen: dict[str, Any], recorded: dict[str, np.ndarray], compare: Any) -> None:
    """Vision features before and after the projector. Our batch has no pictures of samples without
    placeholder.
    """
    features, cut = seen["projector_in"], seen["batch"].get("image_token_counts")
    if not seen["used"] or "pixel_values" not in seen["batch"] or len(features) != len(seen["used"]):
        # A text-only batch (one zero picture keeps the projector in the graph), or pictures that are cut away
        # as a whole.
        assert not seen["used"] or len(cut) < len(seen["used"])
        return
    compare("projector_in", features, recorded["projector_in"][seen["used"]])
    with torch.no_grad():
        tokens = model.model.get_image_features(seen["batch"]["pixel_values"]).pooler_output
    ours = torch.stack(tokens)
    compare("projector_out", ours, recorded["projector_out"][seen["used"]][:, : ours.shape[1]])


def compare_gradients(model, recorded: dict[str, np.ndarray], compare: Any) -> None:
    """Gradients of the projector in full, of some weights of the language model, and the norms of all of
    its weights.
    """
    projector = {
        key.removeprefix("grad/"): torch.from_numpy(value)
        for key, value in recorded.items()
        if "mm_projector" in key
    }
    ours = dict(model.model.multi_modal_projector.named_parameters())
    theirs = keys.projector_from_original(projector)
    assert set(ours) == set(theirs)
    for key, gradient in theirs.items():
        compare("projector gradients", ours[key].grad, gradient)
    parameters = {
        name.replace("model.language_model.", "model."): value
        for name, value in model.named_parameters()
        if "language_model" in name or name == "lm_head.weight"
    }
    for key in recorded:
        name = key.removeprefix("grad/")
        if key.startswith("grad/") and name in parameters:
            compare("LLM gradients", parameters[name].grad, recorded[key])
    names = [str(name) for name in recorded["gradnorm_names"]]
    norms = {name: float(value.grad.double().norm()) for name, value in parameters.items()}
    shared = [index for index, name in enumerate(names) if name in norms]
    assert len(shared) == len(norms)
    compare(
        "LLM gradient norms", [norms[names[index]] for index in shared], recorded["gradnorm_values"][shared]
    )


def has_placeholders(root: Path, recording: dict[str, Any]) -> bool:
    batch = reference.arrays(root / "batches" / f"{recording['batch']}__{recording['tower']}.npz")
    return bool((batch["input_ids"] == IMAGE_TOKEN_INDEX).any())


def test_text_only_batches_give_the_projector_exact_zeros(root):
    found = [entry for entry in reference.recordings(root) if not has_placeholders(root, entry)]
    assert found
    for recording in found:
        model, _, _ = run(root, recording, reference.arrays(root / recording["file"]))
        for parameter in model.model.multi_modal_projector.parameters():
            assert parameter.grad is not None
            assert (parameter.grad == 0).all()


def test_what_fails_in_the_published_code_is_refused_or_needs_no_constant(root, attempt):
    """With published behaviour such a combination is refused with a message; without it, it works."""
    settings = reference.read(root / "model" / "index_fork.json")["configs"][attempt["config"]]
    flags = settings["flags"].get("args", {})
    if flags.get("add_registers") or "num_vision_tokens" in flags:
        # Neither is a flag here: registers change nothing, and the number of patches comes from the tower.
        return
    chosen = interventions_of(settings)
    with pytest.raises(InterventionError, match="the published code fails"):
        chosen.validate()
    import dataclasses

    side = chosen.final_spatial_size
    described = dataclasses.replace(
        chosen, published_behaviour=False, final_spatial_size=side and side * side
    )
    described.validate()
