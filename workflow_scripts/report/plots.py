"""The report's figures as inline SVG: text in the page's own font and colour, so that they fit light and
dark.
"""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

# Told apart on white and on near-black, also by people with colour-blindness; later experiments get dashes.
PALETTE = ("#3b7dd8", "#e07b39", "#2f9e6e", "#b65fc2", "#c9a227", "#3fa7b5", "#d1495b", "#80868f")
DASHES = ("solid", "dashed", "dotted", "dashdot")
# Stand-ins that are replaced by the page's own colours.
INK, RULE = "#010203", "#040506"
SHOWN_POINTS = 300
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def colour(index: int) -> str:
    """The colour of the experiment number ``index``."""
    return PALETTE[index % len(PALETTE)]


def dash(index: int) -> str:
    """Its line style: solid until the colours are used up."""
    return DASHES[index // len(PALETTE) % len(DASHES)]


def to_svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element that scales with its column; ``label`` is read out by screen readers."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", bbox_inches="tight", pad_inches=0.05, metadata={"Date": None})
    pyplot.close(figure)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor").replace(RULE, "var(--line)")
    svg = re.sub(
        r"font: ([^;\"]*?)(\d+(?:\.\d+)?)px [^;\"]*", r"font: \1\2px inherit; font-family: inherit", svg
    )
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    words = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{words}"', 1)


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Running median over ``width`` values (fewer at the start): single odd batches leave no trace."""
    return [statistics.median(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def window(steps: int) -> int:
    """How many steps are smoothed over."""
    return max(5, steps // 50)


def _thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    stride = max(1, len(steps) // SHOWN_POINTS)
    chosen = sorted({*range(0, len(steps), stride), len(steps) - 1})
    return [steps[i] for i in chosen], [values[i] for i in chosen]


def loss_figure(curves: Mapping[str, tuple[int, Sequence[int], Sequence[float]]], label: str) -> str:
    """Training loss of several runs in one frame, smoothed; logarithmic where it spans a decade.

    ``curves``: name to (colour index, steps, losses). Names are not drawn; the page has the legend.
    """
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(5.6, 3.0))
        everything: list[float] = []
        for index, steps, losses in curves.values():
            shown = smooth(losses, window(len(losses)))
            everything += shown
            axes.plot(*_thinned(steps, shown), color=colour(index), linestyle=dash(index), linewidth=1.6)
        if max(everything, default=1) > 10 * min(everything, default=1) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.margins(x=0.01)
        return to_svg(figure, label)


def length_figure(bars: Sequence[tuple[int, Sequence[int], Sequence[int]]], cut: int, label: str) -> str:
    """How many samples have which length, one outline for each (colour index, edges, samples); dotted: the
    cut.

    ``edges`` are the lower ends of the bars and the last one's upper end.
    """
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(5.6, 2.2))
        for index, edges, samples in bars:
            axes.stairs(samples, edges, color=colour(index), linestyle=dash(index), linewidth=1.5)
        axes.axvline(cut, color=INK, linewidth=0.8, linestyle=(0, (2, 3)), alpha=0.7)
        axes.set_xlabel("tokens")
        axes.set_ylabel("samples")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        return to_svg(figure, label)


def _accuracy_panel(axes: Axes, kind: str, rows: Sequence[Mapping[str, Any]], chance: float | None) -> None:
    for y, row in enumerate(rows):
        found = {condition: shares.get(kind) for condition, shares in row["accuracy"].items()}
        normal, permuted, blank = (found.get(name) for name in ("normal", "permuted", "blank"))
        shade = colour(row["index"])
        if normal is not None and permuted is not None:
            axes.plot(
                [100 * permuted, 100 * normal], [y, y], color=shade, linewidth=1.4, alpha=0.55, zorder=2
            )
        if blank is not None:
            axes.plot(100 * blank, y, marker="|", color=INK, markersize=10, markeredgewidth=1.4, zorder=3)
        if permuted is not None:
            axes.plot(
                100 * permuted, y, marker="o", markerfacecolor="none", color=shade, markersize=7, zorder=4
            )
        if normal is not None:
            axes.plot(100 * normal, y, marker="o", color=shade, markersize=7, zorder=5)
    if chance is not None:
        axes.axvline(100 * chance, color=INK, linewidth=0.8, linestyle=(0, (2, 3)), alpha=0.7, zorder=1)
    axes.set_title(kind, fontsize=11, loc="left")
    axes.set_xlim(-4, 104)
    axes.set_xticks([0, 50, 100])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


def accuracy_figure(
    rows: Sequence[Mapping[str, Any]], kinds: Sequence[str], chance: Mapping[str, float], label: str
) -> str:
    """One panel a question type, one line an experiment.

    A full dot is the accuracy in %, a ring the accuracy with permuted vision tokens, a bar with a blank
    picture; the dotted line is chance. ``rows``: mappings with name, index (colour) and accuracy by condition
    and type.
    """
    with pyplot.rc_context(STYLE):
        size = (2.1 * len(kinds) + 1.6, 0.34 * len(rows) + 0.8)
        figure, panels = pyplot.subplots(1, len(kinds), figsize=size, sharey=True, squeeze=False)
        for axes, kind in zip(panels[0], kinds, strict=True):
            _accuracy_panel(axes, kind, rows, chance.get(kind))
        panels[0][0].set_yticks(range(len(rows)), [row["name"] for row in rows])
        figure.subplots_adjust(wspace=0.12)
        return to_svg(figure, label)


def diagnostics_figure(panels: Sequence[Mapping[str, Any]], label: str) -> str:
    """One column an experiment: above, norms by layer (full line: vision, dashed: text); below, CMB by layer
    and head, from 0 (text alone, the page's colour) to 1 (vision alone, the experiment's).

    ``panels``: mappings with name, index (colour), norms (vision and text: layers, values) and cmb (a table,
    heads x layers).
    """
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    with pyplot.rc_context(STYLE):
        size = (2.6 * columns + 0.6, 3.4 * rows)
        figure, grid = pyplot.subplots(2 * rows, columns, figsize=size, squeeze=False)
        for place in range(rows * columns):
            row, column = divmod(place, columns)
            above, below = grid[2 * row][column], grid[2 * row + 1][column]
            if place < len(panels):
                _norm_panel(above, panels[place])
                _head_panel(below, panels[place])
            else:
                above.set_axis_off()
                below.set_axis_off()
        high = max(value for panel in panels for _, values in panel["norms"].values() for value in values)
        low = min(value for panel in panels for _, values in panel["norms"].values() for value in values)
        for axes in grid[::2].flat:
            axes.set_ylim(low / 1.4, high * 1.4)
        for row in range(rows):
            grid[2 * row][0].set_ylabel("norm")
            grid[2 * row + 1][0].set_ylabel("head")
        figure.tight_layout()
        return to_svg(figure, label)


def _norm_panel(axes: Axes, panel: Mapping[str, Any]) -> None:
    for (layers, values), style in zip(panel["norms"].values(), ("solid", "dashed"), strict=True):
        axes.plot(layers, values, color=colour(panel["index"]), linestyle=style, linewidth=1.6)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.set_title(panel["name"], fontsize=11, loc="left")


def _head_panel(axes: Axes, panel: Mapping[str, Any]) -> None:
    table = panel["cmb"]
    for head, shares in enumerate(table.to_numpy()):
        for layer, share in zip(table.columns, shares, strict=True):
            box = (layer - 0.46, head - 0.46)
            axes.add_patch(
                Rectangle(
                    box, 0.92, 0.92, facecolor=colour(panel["index"]), edgecolor="none", alpha=float(share)
                )
            )
    axes.set_xlim(min(table.columns) - 0.6, max(table.columns) + 0.6)
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axes.set_xlabel("layer")
