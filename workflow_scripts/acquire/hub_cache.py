"""Where the hub client keeps what it has fetched, without importing the client: for plans."""

from __future__ import annotations

import os
from pathlib import Path


def hub_cache() -> Path:
    """The folder of the hub client's cache, without importing the client."""
    if (cache := os.environ.get("HF_HUB_CACHE")) is not None:
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME")
    base = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return base.expanduser() / "hub"


def cached_in_hub(repo: str, repo_type: str, revision: str, path: str) -> bool:
    """True when the client's cache has the file at this revision."""
    snapshots = hub_cache() / f"{repo_type}s--{repo.replace('/', '--')}" / "snapshots"
    return snapshots.is_dir() and any(
        (folder / path).exists() for folder in snapshots.iterdir() if folder.name.startswith(revision)
    )
