"""Losses of several runs in one picture, over steps, tokens, FLOPs and hours; and a scaling law with the runs it was fitted to."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AXES = ("steps", "tokens", "FLOPs", "hours")
_LOSS = "nats per token"
_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


@dataclass(frozen=True)
class Curve:
    """One run: for each of `AXES` where its rows are, and the losses of the rows, in nats per token; None where none was logged."""

    label: str
    along: dict[str, list[float]]
    train: list[float | None]
    held_out: list[float | None]


@dataclass(frozen=True)
class LawLine:
    """A line of a fitted law: loss over `x`."""

    label: str
    x: list[float]
    loss: list[float]


@dataclass(frozen=True)
class LawPlot:
    """A law and its runs: `points` are (label, x, measured loss); `floor` is the loss that no scale removes."""

    title: str
    xlabel: str
    points: list[tuple[str, float, float]]
    lines: list[LawLine]
    floor: float


def write_comparison(directory: Path, curves: Sequence[Curve]) -> list[Path]:
    """Writes `comparison.png` and `comparison.html`, which opens offline, into the directory."""
    return [
        _saved(directory / "comparison.png", lambda path: _comparison_figure(curves).savefig(path, format="png")),
        _saved(directory / "comparison.html", lambda path: _comparison_page(curves).write_html(path, include_plotlyjs=True)),
    ]


def write_law(directory: Path, plot: LawPlot) -> list[Path]:
    """Writes `scaling-law.png` and `scaling-law.html`, which opens offline, into the directory."""
    return [
        _saved(directory / "scaling-law.png", lambda path: _law_figure(plot).savefig(path, format="png")),
        _saved(directory / "scaling-law.html", lambda path: _law_page(plot).write_html(path, include_plotlyjs=True)),
    ]


def points(curve: Curve, axis: str, losses: list[float | None]) -> tuple[list[float], list[float]]:
    """Places and values of the losses that there are."""
    pairs = [(x, loss) for x, loss in zip(curve.along[axis], losses, strict=True) if loss is not None]
    return [x for x, _ in pairs], [loss for _, loss in pairs]


def _comparison_figure(curves: Sequence[Curve]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), dpi=110, layout="constrained")
    for panel, axis in zip(figure.subplots(2, 2, sharey=True).flat, AXES, strict=True):
        for number, curve in enumerate(curves):
            colour = _COLOURS[number % len(_COLOURS)]
            panel.plot(*points(curve, axis, curve.train), color=colour, linewidth=1, alpha=0.5)
            panel.plot(*points(curve, axis, curve.held_out), color=colour, marker="o", markersize=4, label=curve.label)
        panel.set(xlabel=axis, ylabel=_LOSS)
        panel.grid(alpha=0.3)
    figure.suptitle("loss: lines with dots held-out, thin lines training")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    return figure


def _comparison_page(curves: Sequence[Curve]) -> Any:
    import plotly.graph_objects as graph
    from plotly.subplots import make_subplots

    page = make_subplots(rows=2, cols=2, shared_yaxes=True, vertical_spacing=0.12)
    for place, axis in enumerate(AXES):
        row, col = place // 2 + 1, place % 2 + 1
        for number, curve in enumerate(curves):
            style = {"line": {"color": _COLOURS[number % len(_COLOURS)]}, "legendgroup": curve.label}
            x, loss = points(curve, axis, curve.train)
            page.add_trace(
                graph.Scatter(x=x, y=loss, name=f"{curve.label}, training", opacity=0.5, showlegend=False, **style), row=row, col=col
            )
            x, loss = points(curve, axis, curve.held_out)
            page.add_trace(
                graph.Scatter(x=x, y=loss, name=curve.label, mode="lines+markers", showlegend=place == 0, **style), row=row, col=col
            )
        page.update_xaxes(title_text=axis, row=row, col=col)
        page.update_yaxes(title_text=_LOSS, row=row, col=col)
    page.update_layout(title={"text": "loss: lines with dots held-out, thin lines training"}, height=900)
    return page


def _law_figure(plot: LawPlot) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=110, layout="constrained")
    axes = figure.subplots()
    for number, line in enumerate(plot.lines):
        axes.plot(line.x, line.loss, color=_COLOURS[number % len(_COLOURS)], linewidth=1, label=line.label)
    axes.plot([x for _, x, _ in plot.points], [loss for _, _, loss in plot.points], "k.", label="runs")
    axes.axhline(plot.floor, color="gray", linestyle="--", linewidth=1, label=f"E = {plot.floor:.4g}")
    axes.set(title=plot.title, xlabel=plot.xlabel, ylabel=_LOSS, xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    return figure


def _law_page(plot: LawPlot) -> Any:
    import plotly.graph_objects as graph

    page = graph.Figure(layout={"title": {"text": plot.title}, "xaxis_title": plot.xlabel, "yaxis_title": _LOSS})
    for line in plot.lines:
        page.add_trace(graph.Scatter(x=line.x, y=line.loss, name=line.label, mode="lines"))
    names, x, loss = ([point[i] for point in plot.points] for i in range(3))
    page.add_trace(graph.Scatter(x=x, y=loss, text=names, name="runs", mode="markers", marker={"color": "black"}))
    page.add_hline(y=plot.floor, line_dash="dash", annotation_text=f"E = {plot.floor:.4g}")
    page.update_xaxes(type="log")
    page.update_yaxes(type="log")
    return page


def _saved(path: Path, write: Callable[[Path], Any]) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)
    return path
