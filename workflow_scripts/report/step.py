"""Writes the report: one HTML page without any other file, and its numbers as CSV and parquet beside it.

    python -m workflow_scripts.report --inputs MANIFEST... --output report/index.html

The inputs are manifests in any order; each kind is recognised by its content and each is optional, so that a
configuration without an evaluation gets a page without accuracies:

  experiments/<experiment>/checkpoint.json   names of the experiments, their runs, links to the checkpoints
  experiments/<experiment>/evaluation/<task>.json   accuracies and example answers
  experiments/<experiment>/comparison.json   differences to the baseline
  experiments/<experiment>/diagnostics.json  norms and attention, from the tables that it names
  runs/<stage>/<run>/manifest.json   losses and provenance, from the files beside it
  data/mixtures/<mixture>/manifest.json      what was dropped and kept, a contact sheet of samples
  data/surveys/<survey>/manifest.json        lengths in tokens, what is cut, what has no label
  data/scans/<source>/manifest.json          counts by status, from the table beside it which file is damaged
  data/sources/<source>/manifest.json        where the pictures are, for thumbnails
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_ext.files import write_text
from workflow_scripts.command_line import command_line
from workflow_scripts.io import user_errors
from workflow_scripts.manifests import origin_of
from workflow_scripts.report import collect, diagnostics, evaluations
from workflow_scripts.report.collect import Collected
from workflow_scripts.report.table import text_table
from workflow_scripts.stages import STAGES


def loss_sections(found: Collected, colours: Mapping[str, int]) -> list[dict[str, Any]]:
    """One section a stage: the loss figure with its legend, and a row for each training."""
    from workflow_scripts.report import plots

    users, sections = collect.training_users(found), []
    for stage in STAGES.values():
        keys = [key for key in users if key[0] == stage.name]
        keys.sort(key=lambda key: min((colours[name] for name in users[key]), default=len(colours)))
        curves, legend, rows = {}, [], []
        for position, key in enumerate(keys):
            index = min((colours[name] for name in users[key]), default=len(colours) + position)
            row = collect.training_row(key, found.trainings[key], users[key])
            steps = collect.metrics(found.trainings[key])
            if steps:
                curves[key[1]] = (index, [int(s["step"]) for s in steps], [float(s["loss"]) for s in steps])
            rows.append({**row, "colour": plots.colour(index), "dash": plots.dash(index)})
            legend.append({"colour": plots.colour(index), "names": users[key] or [key[1]]})
        if rows:
            window = max((plots.window(len(steps)) for _, steps, _ in curves.values()), default=1)
            figure = plots.loss_figure(curves, f"Training loss. {stage.title}") if curves else None
            section = {
                "stage": stage.name,
                "title": stage.title,
                "figure": figure,
                "legend": legend,
                "rows": rows,
            }
            sections.append(section | {"window": window})
    return sections


def experiment_rows(found: Collected, colours: Mapping[str, int], page: Path) -> list[dict[str, Any]]:
    """One row an experiment: what it is, and where its checkpoints are."""
    from workflow_scripts.report import plots

    rows = []
    for name, (path, content) in found.checkpoints.items():
        titles = {"hf": "HF checkpoint", "llava": "LLaVA layout"}
        links = {title: path.parent / key for key, title in titles.items() if key in content["paths"]}
        links["checkpoint.json"] = path
        rows.append(
            {
                "name": name,
                "colour": plots.colour(colours[name]),
                "description": content.get("description") or "",
                "origin": origin_of(content["origin"]) if "origin" in content else "",
                "interventions": {key: _plain(value) for key, value in content["interventions"].items()},
                "links": {text: collect.relative(target, page) for text, target in links.items()},
                "loads_with": content.get("loads_with", {}),
                "runs": content["runs"],
                "digest": content.get("digest", ""),
            }
        )
    return rows


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def provenance_rows(
    found: Collected, sections: Sequence[Mapping[str, Any]], page: Path
) -> list[dict[str, Any]]:
    """What each training recorded: code, versions, machine, command, configuration."""
    rows = []
    for section in sections:
        for row in section["rows"]:
            about = dict(row["provenance"])
            code = about.get("code", {})
            rows.append(
                {
                    "stage": row["stage"],
                    "run": row["run"],
                    "experiments": row["experiments"],
                    "folder": collect.relative(row["folder"], page),
                    "commit": str(code.get("commit", "unknown")),
                    "changed": len(code.get("changed_files", [])),
                    "code_version": code.get("version"),
                    "versions": about.get("versions", {}),
                    "hardware": about.get("hardware", {}),
                    "command": " ".join(str(word) for word in about.get("command", [])),
                    "configuration": json.dumps(about.get("configuration", {}), indent=2, sort_keys=True),
                    "finished": _time(about.get("finished")),
                }
            )
    return rows


def _time(seconds: Any) -> str:
    return (
        time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds)) if isinstance(seconds, int | float) else ""
    )


def render(found: Collected, page: Path) -> str:
    """The page's HTML. Everything that comes from data is escaped by the template engine."""
    import jinja2
    from markupsafe import Markup

    from workflow_scripts.report import data

    tasks = collect.evaluations_by_task(found)
    asked = [name for scores in tasks.values() for name in scores]
    colours = {name: i for i, name in enumerate(dict.fromkeys([*found.checkpoints, *asked]))}
    trainings = loss_sections(found, colours)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["svg"] = Markup
    environment.filters["breakable"] = lambda text: Markup("_<wbr>").join(str(text).split("_"))
    environment.filters["duration"] = duration
    return environment.get_template("page.html.j2").render(
        experiments=experiment_rows(found, colours, page),
        evaluation=evaluations.summary(tasks, found, colours),
        tasks=evaluations.task_sections(tasks, found, colours),
        diagnostics=diagnostics.sections(found, colours),
        disagreements=evaluations.disagreements(tasks, found),
        examples=evaluations.example_cards(tasks, found),
        names=list(dict.fromkeys(asked)),
        trainings=trainings,
        sources=data.source_cards(found),
        mixtures=data.mixture_cards(found),
        provenance=provenance_rows(found, trainings, page),
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def write_report(inputs: Sequence[Path], output: Path) -> str:
    """Writes the page and, where there are evaluations, their tables; returns the accuracies as text."""
    found = collect.collect(inputs)
    tasks = collect.evaluations_by_task(found)
    if tasks:
        evaluations.write_tables(tasks, found, output.parent)
    if found.diagnostics:
        diagnostics.write_table(found, output.parent)
    write_text(output, render(found, output))
    return text_table(tasks)


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Writes the report and prints the accuracies."""
    parser = command_line("report", __doc__, paths={"output": "the page, to be written"})
    parser.add_argument("--inputs", required=True, nargs="+", type=Path, help="manifests, see above")
    options = parser.parse_args(argv)
    table = write_report(options.inputs, options.output)
    if table:
        print(f"accuracy in %:\n{table}", flush=True)
    print(f"report: {options.output.absolute()}", flush=True)


if __name__ == "__main__":
    main()
