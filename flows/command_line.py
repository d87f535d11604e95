"""The command line of train-llama: presets and flags, `doctor`, `verify PATH`, `adopt PATH`, `rollback PATH`, `push PATH`, `report PATH`.

Exit status: 0 the last checkpoint is committed (or the plan, the check, was good), 1 a step failed, 2 the request was wrong,
130 stopped on request.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import tyro
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from flows.flag_errors import explain, parse_flags
from flows.launching import launch, prepare_prefect
from model.batch_size_flag import batch_size_flags
from model.config_base import nearest
from tasks.config import RunConfig
from tasks.datasets import OWN_TEXT, Reading, own_text_mixture
from tasks.experiment import root_place
from tasks.plan_text import component_rows, plan_lines, plan_rows
from tasks.planning import Plan, plan_run
from tasks.preflight import check_accelerator, preflight, preflight_lines, refuse_what_does_not_fit
from tasks.presets import Preset, preset

A = TypeVar("A", bound="Arguments")
console = Console(highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Flags of one run; those of the configuration follow, by section."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    text: tuple[str, ...] = ()
    """Train on text of your own, instead of the preset's data: paths, globs or URLs of text, jsonl, json or parquet files."""
    reading: Reading = OWN_TEXT
    """How the files of --text become documents."""
    root: str | None = None
    """Where artifacts lie, a directory or gs://bucket/prefix; unset: PREFECT_LLAMA_ROOT, else ./artifacts."""
    plan: bool = False
    """Print what would run and be reused, and why, and stop."""
    only: str | None = None
    """Regular expression: just the steps (kind/name) that it finds, and what they need."""
    force: tuple[str, ...] = ()
    """Regular expressions: run the steps (kind/name) that they find although they are there."""


def run_command(arguments: list[str]) -> int:
    """Runs one command line; returns the exit status."""
    from flows.maintenance import COMMANDS

    first = arguments[0] if arguments else ""
    if first in COMMANDS:
        return named_errors(lambda: COMMANDS[first](arguments[1:]))
    names = [entry.value for entry in Preset]
    if first and not first.startswith("-") and first not in names:
        print(f"error: unknown preset or command {first!r}{nearest(first, [*names, *COMMANDS])}", file=sys.stderr)
        print(f"presets: {', '.join(names)}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    chosen, rest = (first, arguments[1:]) if first in names else (Preset.DEBUG.value, arguments)
    return named_errors(lambda: _run(parse(Arguments(config=preset(chosen)), rest, prog=f"train.py {chosen}"), chosen))


def parse(default: A, arguments: list[str], *, prog: str, description: str = "") -> A:
    """The flags of a command line over `default`.

    Raises:
        MistakenFlags: saying which, and what to give instead.
        SystemExit: help was asked for.
    """
    return parse_flags(
        type(default),
        arguments,
        default=default,
        prog=prog,
        description=description
        or "Pretrain a Llama from raw text: `train.py [PRESET] [flags]`, or `train.py doctor|verify|adopt|rollback|push|report`.",
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
        registry=batch_size_flags(),
    )


def named_errors(command: Callable[[], int]) -> int:
    """Runs a command; errors that carry their own explanation are printed as one message."""
    try:
        return command()
    except (ValueError, OSError) as error:
        for text in explained(error):
            print(f"error: {text}", file=sys.stderr)
        return 2


def explained(error: ValueError | OSError, within: str = "") -> list[str]:
    """What an error that explains itself says, a message for each thing that is wrong. within: the section of its fields."""
    if isinstance(error, ValidationError):
        return [explain(problem, within) for problem in error.errors(include_url=False)]
    # an error of our own with a number for programs: people need the text
    return [error.strerror if isinstance(error, OSError) and error.strerror and error.filename is None else str(error)]


def _run(arguments: Arguments, preset_name: str | None) -> int:
    config, root = arguments.config, root_place(arguments.root)
    if arguments.text:
        config = config.model_copy(update={"data": own_text_mixture(arguments.text, config.data.tokenizer, arguments.reading)})
    plan = plan_run(config, root, only=arguments.only, force=arguments.force, to_read=arguments.plan)
    print_plan(plan)
    if arguments.plan:
        print_preflight(plan)
        return 0
    if plan.has_training:
        check_accelerator(config.name, plan.model, plan.own_train, tell=tell, pool=config.pool)

    from tasks.children import ChildStopped
    from tasks.summary import RunSummary

    prepare_prefect()
    try:
        artifacts = launch(config, str(root), arguments.only, arguments.force, preset_name=preset_name)
    except (KeyboardInterrupt, ChildStopped) as stop:
        print(f"stopped: {how_to_continue(stop, arguments.force)}", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if (summary := RunSummary.of(artifacts)) is not None:
        print_summary(summary)
    return 0


def how_to_continue(stop: BaseException, force: Sequence[str]) -> str:
    """What to tell who stopped a run."""
    message = str(stop) or "everything finished so far is kept: run the same command again to continue"
    # --force would throw away what was just saved
    return message.replace("the same command again", "the same command again, without --force,") if force else message


def print_plan(plan: Plan) -> None:
    """The plan's numbers and tables."""
    console.print(f"[bold]{plan.config.name}[/bold]")
    for line in plan_lines(plan):
        name, _, value = line.partition(": ")
        console.print(f"  {name:<8} {value}", markup=False)
    if rows := component_rows(plan):
        print_table(("dataset", "share", "tokens", "epochs"), rows)
    print_table(("step", "", "why"), plan_rows(plan))


def print_preflight(plan: Plan) -> None:
    """What the TPU compiler says of the run, where it asks for a slice. Raises ValueError where it cannot run there."""
    if plan.config.train.accelerator_type is None or not plan.has_training:
        return
    found = preflight(plan.config.name, plan.model, plan.own_train, tell=tell)
    if found is None:
        return
    for line in preflight_lines(found):
        name, _, value = line.partition(": ")
        console.print(f"  {name:<8} {value}", markup=False)
    refuse_what_does_not_fit(found)


def tell(line: str) -> None:
    """How far something long is: beside the output, never in it."""
    print(line, file=sys.stderr, flush=True)


def print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A table without a frame."""
    table = Table(show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_summary(summary: object) -> None:
    """The outcome of a run, a `RunSummary`: curve, held-out loss, samples, places."""
    from model.plots import terminal_plot
    from tasks.summary import RunSummary, four_digits

    assert isinstance(summary, RunSummary)
    print(terminal_plot(summary.rows(), unigram_entropy=summary.unigram_entropy))
    if held_out := summary.held_out():
        table = Table("held-out", "nats per token", "bits per byte", show_edge=False, pad_edge=False)
        for name, loss, bpb in held_out:
            table.add_row(name, four_digits(loss), four_digits(bpb))
        console.print(table)
    if summary.components:
        rows = [(name, f"{part['tokens']:,.0f}", f"{part['epochs']:.3g}") for name, part in summary.components.items()]
        print_table(("trained on", "tokens", "epochs"), rows)
    for sample in summary.samples:
        console.print(f"\n--- {sample['prompt']!r}", markup=False)
        console.print(sample["text"], markup=False)
    console.print("\n" + summary.headline(), markup=False)
    for what, path in summary.places():
        console.print(f"  {what:<24} {path}", markup=False)
