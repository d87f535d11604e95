"""The command line of train-llama: presets and flags, `doctor`, `verify PATH`, `adopt PATH`, `rollback PATH`, `push PATH`, `report PATH`.

Exit status: 0 the last checkpoint is committed (or the plan, the check, was good), 1 a step failed, 2 the request was wrong,
130 stopped on request.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from flows.flag_errors import explain, parse_flags
from model.batch_size_flag import batch_size_flags
from model.config_base import nearest
from tasks.config import RunConfig
from tasks.datasets import OWN_TEXT, Reading, own_text_mixture
from tasks.experiment import root_place
from tasks.planning import Plan, component_rows, plan_lines, plan_rows, plan_run
from tasks.preflight import check_accelerator, preflight, preflight_lines, refuse_what_does_not_fit
from tasks.presets import Preset, preset

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
    return named_errors(lambda: _run(_parse(preset(chosen), rest, prog=f"train.py {chosen}"), chosen))


def run_experiments(runs: list[RunConfig], description: str) -> int:
    """Runs declared experiments one after the other, all with the flags of this command line; returns the exit status."""
    for run in runs:  # all are checked before the first one trains
        status = named_errors(lambda run=run: int(plan_run(run, root_place(None)) is None))
        if status:
            return status
    for run in runs:
        status = named_errors(lambda run=run: _run(_parse(run, sys.argv[1:], prog=run.name, description=description), None, description))
        if status:
            return status
    return 0


def _parse(default: RunConfig, arguments: list[str], *, prog: str, description: str = "") -> Arguments:
    return parse_flags(
        Arguments,
        arguments,
        default=Arguments(config=default),
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
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            print(f"error: {explain(problem)}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        # an error of our own with a number for programs: people need the text
        text = error.strerror if isinstance(error, OSError) and error.strerror and error.filename is None else error
        print(f"error: {text}", file=sys.stderr)
        return 2


def _run(arguments: Arguments, preset_name: str | None, description: str = "") -> int:
    config, root = arguments.config, root_place(arguments.root)
    if arguments.text:
        config = config.model_copy(update={"data": own_text_mixture(arguments.text, config.data.tokenizer, arguments.reading)})
    plan = plan_run(config, root, only=arguments.only, force=arguments.force)
    _print_plan(plan)
    if arguments.plan:
        _print_preflight(plan)
        return 0
    check_accelerator(config.name, plan.model, config.train, tell=_tell, pool=config.pool)

    from flows.temporary_server import use_temporary_server
    from flows.train import train_llama
    from tasks.children import ChildStopped
    from tasks.summary import RunSummary

    one_line_errors()
    use_temporary_server()
    # Prefect turns SIGTERM into an exception and, when the flow has ended, sends it again for the handler from before.
    signal.signal(signal.SIGTERM, interrupt)
    try:
        artifacts = train_llama(
            preset=Preset(preset_name or Preset.DEBUG),
            name=config.name,
            model=config.model,
            train=config.train,
            data=config.data,
            tokenize=config.tokenize,
            export=config.export,
            eval_harness=config.eval_harness,
            track=list(config.track),
            tags=list(config.tags),
            description=description,
            pool=config.pool,
            root=str(root),
            only=arguments.only,
            force=list(arguments.force),
        )
    except (KeyboardInterrupt, ChildStopped) as stop:
        message = str(stop) or "everything finished so far is kept: run the same command again to continue"
        if arguments.force:  # which would throw away what was just saved
            message = message.replace("the same command again", "the same command again, without --force,")
        print(f"stopped: {message}", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if (summary := RunSummary.of(artifacts)) is not None:
        _print_summary(summary)
    return 0


def interrupt(number: int, _frame: Any) -> None:
    """A request to stop is answered like Ctrl-C."""
    raise KeyboardInterrupt


def _print_plan(plan: Plan) -> None:
    console.print(f"[bold]{plan.config.name}[/bold]")
    for line in plan_lines(plan):
        name, _, value = line.partition(": ")
        console.print(f"  {name:<8} {value}", markup=False)
    _print_table(("dataset", "share", "tokens", "epochs"), component_rows(plan))
    _print_table(("step", "", "why"), plan_rows(plan))


def _print_preflight(plan: Plan) -> None:
    """What the TPU compiler says of the run, where it asks for a slice. Raises ValueError where it cannot run there."""
    if plan.config.train.accelerator_type is None:
        return
    found = preflight(plan.config.name, plan.model, plan.config.train, tell=_tell)
    if found is None:
        return
    for line in preflight_lines(found):
        name, _, value = line.partition(": ")
        console.print(f"  {name:<8} {value}", markup=False)
    refuse_what_does_not_fit(found)


def _tell(line: str) -> None:
    """How far something long is: beside the output, never in it."""
    print(line, file=sys.stderr, flush=True)


def _print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    table = Table(show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_summary(summary: object) -> None:
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
        _print_table(("trained on", "tokens", "epochs"), rows)
    for sample in summary.samples:
        console.print(f"\n--- {sample['prompt']!r}", markup=False)
        console.print(sample["text"], markup=False)
    console.print("\n" + summary.headline(), markup=False)
    for what, path in summary.places():
        console.print(f"  {what:<24} {path}", markup=False)


class _OneLine(logging.Filter):
    """Errors that explain themselves need no traceback in the terminal; the message says all."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Cuts the traceback off."""
        record.exc_info = record.exc_text = None
        return True


def one_line_errors() -> None:
    """Makes Prefect log errors that explain themselves without a traceback."""
    from tasks.children import ChildFailed, ChildStopped

    explained = (ValueError, OSError, ChildFailed, ChildStopped, KeyboardInterrupt)

    class Only(_OneLine):
        def filter(self, record: logging.LogRecord) -> bool:
            error = record.exc_info[1] if record.exc_info else None
            return super().filter(record) if isinstance(error, explained) else True

    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(Only())
