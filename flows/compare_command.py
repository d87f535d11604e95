"""The command line of compare-llama. Exit status: 0 done, 2 the request was wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from flows.command_line import named_errors
from flows.flag_errors import parse_flags
from tasks.comparison import Comparison
from tasks.scaling_law import LawName

console = Console(highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which runs, and what is made of them."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Directories of runs or sweeps, roots, globs of these, or gs://bucket/prefix."""
    out: Path | None = None
    """Write comparison.png, .html and .json, and of a law scaling-law.png and .html, into this directory."""
    fit: bool = False
    """Fit a scaling law to the finished runs."""
    law: LawName = "auto"
    """L(N, D) of parameters and tokens, or L(C) of compute; auto takes the first where the runs decide it."""


def main(arguments: list[str]) -> int:
    """Runs one command line; returns the exit status."""
    description = "Compare training runs: a table, one plot of loss against steps, tokens, FLOPs and hours, and a scaling law."
    config = (tyro.conf.FlagCreatePairsOff,)
    return named_errors(lambda: _compare(parse_flags(Arguments, arguments, prog="compare.py", description=description, config=config)))


def _compare(options: Arguments) -> int:
    comparison = Comparison.of(options.runs, fit=options.fit, law=options.law)
    columns, lines = comparison.table()
    table = Table(show_edge=False, pad_edge=False)
    for column in columns:
        header = column.rpartition(".")[2].replace(" ", "\n")
        table.add_column(header, overflow="fold", min_width=16 if column == "run" else 6)
    for line in lines:
        table.add_row(*line)
    console.print(table, markup=False)
    for line in comparison.law_lines():
        console.print(line, markup=False)
    for path in comparison.save(options.out) if options.out is not None else ():
        console.print(f"  {path}", markup=False)
    return 0
