"""Readable names of runs."""

from __future__ import annotations

from workflow_scripts.config.experiments import Experiment

# Short words for run folders; flags without one appear under their own name.
SHORT = {
    "normalize_projector": "normalize",
    "use_multilayer_features": "multilayer",
    "compression_after_projection": "compress",
    "twoD_vision_embedding": "2d",
    "interleave": "interleave",
    "add_spatial_coordinates": "coordinates",
}


def slug(experiment: Experiment) -> str:
    """A readable beginning of a run's folder: its flags, not its experiment's name, since runs are shared."""
    flags = experiment.flags
    words = [SHORT.get(key, key) for key, value in flags.items() if value is True]
    size = flags.get("final_spatial_size")
    if size is not None:
        words.append(str(size))
    return "-".join(words) or "vanilla"
