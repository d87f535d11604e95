"""The command line of sweep-llama: a preset, the fields that change, and the flags of a run.

Exit status: 0 every arm that takes part has finished (or the plan was good), 1 an arm failed, 2 the request was wrong,
130 stopped on request.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, NoReturn

import tyro
from rich.console import Console
from rich.table import Table

from flows.command_line import named_errors
from flows.flag_errors import parse_flags
from flows.launching import prepare_prefect
from model.batch_size_flag import batch_size_flags
from model.config_base import nearest
from tasks.config import RunConfig
from tasks.presets import Preset, preset
from tasks.sweep_config import Sweep, parse_grid
from tasks.sweep_plan import PlannedSweep, plan_sweep
from tasks.sweep_table import SweepTable

console = Console(highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Flags of one sweep; those of the run that all arms begin as follow, by section."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    grid: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """FIELD=VALUE,VALUE for each field that changes, such as train.learning_rate=1e-3,3e-3; with --random also FIELD=LOW:HIGH[:log]."""
    random: int | None = None
    """Draw so many arms, instead of every combination."""
    seed: int = 0
    """Of the draws."""
    max_concurrent: int = 2
    """Arms that train at once."""
    budget: str | None = None
    """What all arms may cost together: 3hours, 200dollars or 1e18FLOPs. More is refused before anything starts."""
    fit_budget: bool = False
    """Run the arms that fit into the budget, in their order, instead of refusing them all."""
    root: str | None = None
    """Where artifacts lie, a directory or gs://bucket/prefix; unset: PREFECT_LLAMA_ROOT, else ./artifacts."""
    plan: bool = False
    """Print the arms, what they amount to, and what is there already, and stop."""


def run_command(arguments: list[str]) -> int:
    """Runs one command line; returns the exit status."""
    names = [entry.value for entry in Preset]
    first = arguments[0] if arguments else ""
    if first and not first.startswith("-") and first not in names:
        print(f"error: unknown preset {first!r}{nearest(first, names)}; the presets are {', '.join(names)}", file=sys.stderr)
        return 2
    chosen, rest = (first, arguments[1:]) if first in names else (Preset.DEBUG.value, arguments)
    return named_errors(lambda: _run(_parse(Arguments(config=preset(chosen)), rest, f"sweep.py {chosen}", ""), None))


def sweep_main(sweep: Sweep, description: str = "") -> NoReturn:
    """Runs a sweep that an experiment's file declares, with the flags of this command line, and exits with its status."""
    default = Arguments(config=sweep.base, random=sweep.draws, seed=sweep.seed)
    sys.exit(named_errors(lambda: _run(_parse(default, sys.argv[1:], sweep.base.name, description), sweep)))


def _parse(default: Arguments, arguments: list[str], prog: str, description: str) -> Arguments:
    return parse_flags(
        Arguments,
        arguments,
        default=default,
        prog=prog,
        description=description
        or "Train one run with several values of some fields: `sweep.py [PRESET] --grid FIELD=VALUE,VALUE [flags]`.",
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
        registry=batch_size_flags(),
    )


def _run(options: Arguments, declared: Sweep | None) -> int:
    grid = {**(declared.grid if declared else {}), **parse_grid(options.grid)}
    if not grid:
        raise ValueError("a sweep needs at least one field that changes: --grid train.learning_rate=1e-3,3e-3")
    if options.max_concurrent < 1:
        raise ValueError(f"--max-concurrent={options.max_concurrent}: at least one arm trains at a time")
    sweep = Sweep(base=options.config, grid=grid, draws=options.random, seed=options.seed)
    planned = plan_sweep(sweep, options.root, budget=options.budget, fit=options.fit_budget, tell=_tell)
    _print_plan(planned)
    return 0 if options.plan else _train(sweep, options)


def _train(sweep: Sweep, options: Arguments) -> int:
    from flows.sweep import ArmsFailed, sweep_llama

    prepare_prefect()
    try:
        table = sweep_llama(
            sweep=sweep,
            max_concurrent=options.max_concurrent,
            budget=options.budget,
            fit_budget=options.fit_budget,
            root=options.root,
        )
    except KeyboardInterrupt:
        print("stopped: what the arms have saved is kept: run the same command again to continue", file=sys.stderr)
        return 130
    except ArmsFailed as error:
        _print_table(error.table)
        print("error: not every arm finished, the table says why: the same command runs again those that failed", file=sys.stderr)
        return 1
    except Exception as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print_table(table)
    return 0


def _print_plan(planned: PlannedSweep) -> None:
    console.print(f"[bold]{planned.table.name}[/bold]")
    for line in planned.lines():
        name, _, value = line.partition(": ")
        console.print(f"  {name:<8} {value}", markup=False)
    fields = planned.table.columns()[1 : 1 + len(planned.table.fields)]
    _print_rows(("arm", *fields, "", "why"), planned.rows())


def _print_table(table: SweepTable) -> None:
    _print_rows(table.columns()[:-1], [line[:-1] for line in table.lines()])  # a terminal has no room for paths
    console.print(f"\n{table.headline()}", markup=False)
    if table.best is not None:
        console.print(f"  best     {table.best.place}", markup=False)
    console.print(f"  table    {table.place}", markup=False)


def _print_rows(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)


def _tell(line: str) -> None:
    """How far something long is: beside the output, never in it."""
    print(line, file=sys.stderr, flush=True)
