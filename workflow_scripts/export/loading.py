"""What an exported HF folder loads with."""

from __future__ import annotations

from pathlib import Path

from workflow_scripts.io import read_json


def hf_loads_with(folder: Path) -> list[str]:
    """In words, for manifests."""
    if read_json(folder / "config.json")["model_type"] == "llava":
        return ["transformers: LlavaForConditionalGeneration, AutoProcessor"]
    return [
        "transformers with trust_remote_code=True (the code lies beside the weights)",
        "llava_ext.checkpoints.stored.load_model",
    ]
