"""What the report tells about diagnostics: norms and attention by layer, one small figure an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_ext.files import atomic_path
from workflow_scripts.report.collect import Collected

# By head, with what the table shows of it: the mean over layers and heads.
SHOWN = {
    "cmb": "CMB",
    "entropy": "entropy",
    "rope_logit": "RoPE probe, logit",
    "rope_attention": "RoPE probe, attention",
}
NAME = "diagnostics"


def read_tables(found: Collected) -> Any:
    """All measures of all experiments and tasks in one table; tables that are gone are left out."""
    import pandas

    parts = []
    for name, (path, content) in found.diagnostics.items():
        for task, about in content["diagnostics"].items():
            table = path.parent / about["table"]
            if table.is_file():
                parts.append(pandas.read_parquet(table).assign(experiment=name, task=task))
    columns = ["experiment", "task", "measure", "layer", "head", "value", "count"]
    return pandas.concat(parts)[columns] if parts else pandas.DataFrame(columns=columns)


def sections(found: Collected, colours: Mapping[str, int]) -> list[dict[str, Any]]:
    """One section a task: the small figures, and a row for each experiment."""
    table = read_tables(found)
    made = []
    for task in dict.fromkeys(table.task):
        chosen = table[table.task == task]
        names = [name for name in colours if name in set(chosen.experiment)]
        rows = [_row(name, chosen[chosen.experiment == name], found, task) for name in names]
        made.append({"task": task, "rows": rows, "figure": _figure(task, names, chosen, colours)})
    return made


def _row(name: str, table: Any, found: Collected, task: str) -> dict[str, Any]:
    layered = table[table["head"].isna()].set_index(["measure", "layer"]).value
    means = table[table["head"].notna()].groupby("measure").value.mean()
    last = int(table.layer.max())
    return {
        "name": name,
        "prompts": found.diagnostics[name][1]["diagnostics"][task]["prompts"],
        "vision": float(layered["norm_vision", 0]),
        "text": float(layered["norm_text", 0]),
        "means": [None if means.get(key) is None else float(means[key]) for key in SHOWN],
        "logit": float(layered["permuted_logit", last]),
        "changed": float(layered["permuted_token", last]),
    }


def _figure(task: str, names: list[str], table: Any, colours: Mapping[str, int]) -> str:
    from workflow_scripts.report import plots

    panels = []
    for name in names:
        own = table[table.experiment == name]
        norms = {key: own[own.measure == f"norm_{key}"].sort_values("layer") for key in ("vision", "text")}
        cmb = own[own.measure == "cmb"].astype({"head": int})
        panels.append(
            {
                "name": name,
                "index": colours[name],
                "norms": {key: (rows.layer.tolist(), rows.value.tolist()) for key, rows in norms.items()},
                "cmb": cmb.pivot(index="head", columns="layer", values="value").sort_index(),
            }
        )
    label = (
        f"{task}: norms of vision and text tokens by layer, and the share of attention that goes to vision"
        " by layer and head, for each experiment; diagnostics.csv has the numbers"
    )
    return plots.diagnostics_figure(panels, label)


def write_table(found: Collected, folder: Path) -> None:
    """All measures as CSV and parquet, one line a number."""
    table = read_tables(found)
    with atomic_path(folder / f"{NAME}.csv") as temporary:
        table.to_csv(temporary, index=False)
    with atomic_path(folder / f"{NAME}.parquet") as temporary:
        table.to_parquet(temporary, index=False)
