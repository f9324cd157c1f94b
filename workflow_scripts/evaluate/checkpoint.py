"""An exported checkpoint, loaded as any user would load it.

With transformers' AutoProcessor and AutoModelForImageTextToText from the exported folder alone, and with the
code saved beside the weights where there are interventions.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_ext.files import sha256
from workflow_scripts.io import UserError, read_json

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    model: Any
    processor: Any
    loaded_with: str


def check_code(folder: Path, files: dict[str, str]) -> None:
    """Raises UserError unless every Python file in ``folder`` is one that the export wrote, unchanged."""
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if files.get(name) != sha256(path):
            raise UserError(
                f"{path}: not the file that the export wrote, so it is not run; delete the export's manifest"
                " and export again"
            )


def load_checkpoint(manifest: Path) -> Checkpoint:
    """Loads the exported HF folder with transformers alone; code saved beside the weights is checked
    first.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

    exported = read_json(manifest)
    folder = manifest.parent / exported["folders"]["hf"]
    stock = read_json(folder / "config.json")["model_type"] == "llava"
    if not stock:
        check_code(folder, exported["files"]["hf"])
    loader = LlavaForConditionalGeneration if stock else AutoModelForImageTextToText
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Any = torch.float32 if device == "cpu" else "auto"
    options = {} if stock else {"trust_remote_code": True}
    model, info = loader.from_pretrained(str(folder), dtype=dtype, output_loading_info=True, **options)
    wrong = {
        key: sorted(info[key])
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(key)
    }
    if wrong:
        raise UserError(f"{folder}: the weights do not fit the model: {wrong}; export the checkpoint again")
    processor = AutoProcessor.from_pretrained(str(folder), backend="pil", **options)
    name = type(model).__name__ + ("" if stock else ", code saved beside the weights")
    return Checkpoint(model.to(device).eval(), processor, name)


@contextmanager
def private_module_cache() -> Iterator[None]:
    """Code saved beside weights is copied into a cache before it is imported. This gives the process a cache
    of its own.

    Evaluations run side by side, and all exported folders have the same name. Only works before transformers
    is imported.
    """
    with tempfile.TemporaryDirectory(prefix="modules-") as folder:
        os.environ["HF_MODULES_CACHE"] = folder
        yield


@contextmanager
def permuted_tokens(model: Any, seeds: Sequence[int] | None) -> Iterator[None]:
    """While it lasts, image i's vision tokens come in the random order of ``seeds[i]``; None changes nothing.

    Models with interventions offer a hook behind their last vision step; in the stock model that is the
    projector.
    """
    if seeds is None:
        yield
        return
    import torch

    def shuffle(tokens: torch.Tensor) -> torch.Tensor:
        """``(images, tokens, hidden)``, each image in its own order."""
        orders = [
            torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        order = torch.stack(orders).to(tokens.device)
        return tokens.gather(1, order[..., None].expand_as(tokens))

    core = model.model
    if hasattr(core, "vision_token_hook"):
        core.vision_token_hook = shuffle
        try:
            yield
        finally:
            core.vision_token_hook = None
    else:
        handle = core.multi_modal_projector.register_forward_hook(
            lambda module, inputs, output: shuffle(output)
        )
        try:
            yield
        finally:
            handle.remove()
