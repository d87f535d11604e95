"""A comparison of runs on disk: the table, the plots, and a scaling law where one is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.comparison_plots import LawLine, LawPlot, write_comparison, write_law
from model.durable import write_json
from tasks.compared_runs import ComparedRun, all_of, find_runs, table
from tasks.formatting import number
from tasks.scaling_law import LawName, LawPoint, ScalingLaw, fit_law
from tasks.storage import make_directory


@dataclass(frozen=True)
class Comparison:
    """Runs, and the law fitted to the finished ones among them."""

    runs: tuple[ComparedRun, ...]
    law: ScalingLaw | None

    @classmethod
    def of(cls, words: Sequence[str], *, fit: bool, law: LawName = "auto") -> Comparison:
        """Of the runs that the words name.

        Raises:
            ValueError: a word names no run, or the runs do not decide a law.
        """
        runs = tuple(find_runs(words))
        return cls(runs, fit_law(law_points(runs), law) if fit else None)

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Column names, and a line of text for each run."""
        return table(self.runs)

    def law_lines(self) -> list[str]:
        """What a person reads of the law; of losses that are not comparable, a warning."""
        if self.law is None:
            return []
        data = {run.fields.get("data") for run in self.runs if run.finished}
        warning = ["warning: the runs differ in their data, so that their losses are of different text"] if len(data) > 1 else []
        return [*self.law.lines(), *warning, *left_out(self.runs)]

    def save(self, directory: Path) -> list[Path]:
        """Writes `comparison.png`, `.html` and `.json`, and with a law `scaling-law.png` and `.html`; their places."""
        make_directory(directory)
        law = None
        if self.law is not None:
            numbers = [{"name": each.name, "value": each.value, "interval": each.interval} for each in self.law.coefficients]
            law = {"law": self.law.name, "coefficients": numbers, "error": self.law.error, "runs": len(self.law.points)}
        write_json(directory / "comparison.json", {"runs": all_of(self.runs), "scaling_law": law})
        written = [*write_comparison(directory, [run.curve() for run in self.runs]), directory / "comparison.json"]
        return [*written, *write_law(directory, law_plot(self.law))] if self.law is not None else written


def law_points(runs: Sequence[ComparedRun]) -> list[LawPoint]:
    """The finished runs whose held-out loss is a number, and whose weights are theirs from the beginning."""
    return [
        LawPoint(run.name, run.num_parameters, run.tokens, run.flops, loss)
        for run in runs
        if run.finished
        and run.anew
        and run.num_parameters
        and run.tokens
        and run.flops
        and (loss := run.loss("eval/loss")) is not None
        and loss > 0
    ]


def left_out(runs: Sequence[ComparedRun]) -> list[str]:
    """A line that names the finished runs which are not in a law, whose loss is of more than their own steps; none where there are none."""
    names = ", ".join(run.name for run in runs if run.finished and not run.anew)
    return [f"not in the law, because they go on from other weights: {names}"] if names else []


def law_plot(law: ScalingLaw) -> LawPlot:
    """The runs, and the law over their range and three times as far: over tokens for each size, or over compute."""
    if law.name == "compute":
        sizes = [point.flops for point in law.points]
        x = _range(sizes)
        lines = [LawLine(law.formula, x, [law.loss(each) for each in x])]
        return LawPlot(law.formula, "model FLOPs", [(p.name, p.flops, p.loss) for p in law.points], lines, law["E"])
    x = _range([point.tokens for point in law.points])
    lines = [
        LawLine(f"{number(parameters)} parameters", x, [law.loss(parameters, tokens) for tokens in x])
        for parameters in sorted({point.parameters for point in law.points})
    ]
    return LawPlot(law.formula, "tokens", [(p.name, p.tokens, p.loss) for p in law.points], lines, law["E"])


def _range(sizes: Sequence[float]) -> list[float]:
    return [float(each) for each in np.geomspace(min(sizes), 3 * max(sizes), 60)]
