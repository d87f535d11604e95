"""The loss curve, three ways: PNG and HTML beside the checkpoint, and characters in the terminal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from model.metrics import read_json_lines

Series = tuple[list[int], list[float]]


def series(rows: list[dict[str, Any]], key: str) -> Series:
    """Steps and values of one metric, where it was logged and finite."""
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return [step for step, _ in points], [float(value) for _, value in points]


def write_loss_plots(directory: Path, *, title: str, unigram_entropy: float | None) -> list[Path]:
    """Writes `loss.png` and `loss.html` from `metrics.jsonl` in the same directory; nothing if there is nothing to draw."""
    rows = read_json_lines(directory / "metrics.jsonl")
    if not series(rows, "train/loss")[0]:
        return []
    return [
        _write_png(directory / "loss.png", rows, title, unigram_entropy),
        _write_html(directory / "loss.html", rows, title, unigram_entropy),
    ]


def _write_png(path: Path, rows: list[dict[str, Any]], title: str, unigram_entropy: float | None) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.plot(*series(rows, "train/loss"), color="tab:blue", linewidth=1.2, label="train loss")
    axes.plot(*series(rows, "eval/loss"), color="tab:orange", marker="o", markersize=4, label="held-out loss")
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="gray", linestyle="--", linewidth=1, label="unigram entropy of the text")
    axes.set(title=title, xlabel="optimizer step", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
    return path


def _write_html(path: Path, rows: list[dict[str, Any]], title: str, unigram_entropy: float | None) -> Path:
    import plotly.graph_objects as graph

    figure = graph.Figure(layout={"title": {"text": title}, "xaxis_title": "optimizer step", "yaxis_title": "nats per token"})
    train, held_out = series(rows, "train/loss"), series(rows, "eval/loss")
    figure.add_trace(graph.Scatter(x=train[0], y=train[1], name="train loss", mode="lines"))
    figure.add_trace(graph.Scatter(x=held_out[0], y=held_out[1], name="held-out loss", mode="lines+markers"))
    if unigram_entropy is not None:
        figure.add_hline(y=unigram_entropy, line_dash="dash", annotation_text="unigram entropy of the text")
    temporary = path.with_name(f".{path.name}.tmp")
    figure.write_html(temporary, include_plotlyjs=True)  # inside the page: it must open offline
    os.replace(temporary, path)
    return path


PAGE_CURVES: dict[str, dict[str, str]] = {
    "nats per token": {"train/loss": "train loss", "eval/loss": "held-out loss"},
    "tokens a second": {"throughput/tokens_per_second": "tokens a second"},
    "share": {"goodput": "goodput", "throughput/mfu": "model FLOPs utilisation"},
    "gradient norm": {"grad/norm/total": "gradient norm"},
}


def figures_html(rows: list[dict[str, Any]]) -> list[str]:
    """The curves of `PAGE_CURVES` as parts of an HTML page, those that have points; the first brings the library that draws them all."""
    import plotly.graph_objects as graph

    figures: list[str] = []
    for axis, curves in PAGE_CURVES.items():
        drawn = {name: points for key, name in curves.items() if (points := series(rows, key))[0]}
        if not drawn:
            continue
        layout = {"xaxis_title": "optimizer step", "yaxis_title": axis, "showlegend": True, "margin": {"t": 20}}
        figure = graph.Figure(layout=layout)
        for name, (steps, values) in drawn.items():
            figure.add_trace(graph.Scatter(x=steps, y=values, name=name, mode="lines" if len(steps) > 20 else "lines+markers"))
        options: dict[str, Any] = {"full_html": False, "default_height": 380, "config": {"displayModeBar": False}}
        # named, so that equal curves are equal pages
        figures.append(figure.to_html(include_plotlyjs=not figures, div_id=f"figure-{len(figures)}", **options))
    return figures


def terminal_plot(rows: list[dict[str, Any]], *, unigram_entropy: float | None, width: int = 78, height: int = 16) -> str:
    """The loss curve drawn with characters, without colour codes."""
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(width, height)
    plotext.title("loss, nats per token")
    plotext.plot(*series(rows, "train/loss"), label="train", marker="braille")
    held_out = series(rows, "eval/loss")
    if held_out[0]:
        plotext.scatter(*held_out, label="held-out", marker="x")
    if unigram_entropy is not None:
        plotext.hline(unigram_entropy)
    return plotext.uncolorize(plotext.build())
