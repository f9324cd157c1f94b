"""What the scan of a source asks of a cluster: it follows from the number and the size of its images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from workflow_scripts.config.sources import Source
from workflow_scripts.io import UserError, read_json
from workflow_scripts.plan.needs import size_of
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plan.resources import STEP_JOBS, StepJob

# One CPU looks at ten times as many where the disk is fast; photographs in data sets are about this large.
IMAGES_PER_CPU_S, BYTES_PER_IMAGE = 100, 50_000
# A CPU for so much work of one, and how much longer than estimated a scan may take.
CPU_S, MARGIN, LEAST_MIN = 600, 4, 30


def scan_job(plan: Plan, source: str, folder: Path = Path()) -> StepJob:
    """CPUs and minutes for a source's images; the largest that is usual where nothing says how many."""
    most = STEP_JOBS["scan"]
    images = image_count(plan.config.sources[source], folder / f"data/sources/{source}/manifest.json")
    if images is None:
        return most
    work_s = images / IMAGES_PER_CPU_S
    threads = min(most.threads, max(1, math.ceil(work_s / CPU_S)))
    return StepJob(threads, LEAST_MIN + math.ceil(MARGIN * work_s / 60 / threads), most.mem_mb)


def image_count(spec: Source, manifest: Path) -> float | None:
    """About how many images a source has: as it lies there, else as configured; None if unknown."""
    stated: Any = getattr(spec, "expected_images", None) or getattr(spec, "pictures", None)
    sizes = [size_of(file) for file in spec.remote() if file.role == "images"]
    known = sum(size for size in sizes if size) if all(sizes) else 0
    size = _bytes_of(manifest) or known
    return max(float(stated or 0), size / BYTES_PER_IMAGE) or None


def _bytes_of(manifest: Path) -> float:
    """The size of the archive that a source manifest names; 0 for a folder, and where it is not there yet."""
    try:
        images = read_json(manifest).get("images")
        path = manifest.parent / images["path"] if images else None
        return float(path.stat().st_size) if path and path.is_file() else 0.0
    except (UserError, OSError):
        return 0.0
