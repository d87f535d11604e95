"""The command line of an experiment's file: `python flows/experiments/exp1.py [--plan] [--only ...] [--max-concurrent N] [--deploy POOL]`.

Exit status: that of `flows.command_line`; 1 where any run failed, after all that could run did.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence

from flows.at_once import Outcome, exit_status, run_all
from flows.command_line import (
    Arguments,
    console,
    how_to_continue,
    named_errors,
    parse,
    print_plan,
    print_preflight,
    print_summary,
    print_table,
    tell,
)
from flows.launching import launch, prepare_prefect
from tasks.anneal import ContinuedRun
from tasks.artifacts import Artifact
from tasks.config import RunConfig
from tasks.datasets import own_text_mixture
from tasks.experiment import root_place
from tasks.pipeline import label, matching, run_steps
from tasks.places import Place
from tasks.planning import Plan, plan_run
from tasks.preflight import check_accelerator
from tasks.steps import Step


@dataclasses.dataclass(frozen=True)
class ExperimentArguments(Arguments):
    """Flags of an experiment's file; those of the configuration follow, by section, and change every run of the file."""

    max_concurrent: int = 1
    """Runs at once. A step that several of them share is done once."""
    deploy: str | None = None
    """Make a Prefect deployment train-llama/NAME of each run on this work pool, instead of running it."""


@dataclasses.dataclass(frozen=True)
class Declared:
    """One run of the file with its flags. `begins`: the run whose last checkpoint it goes on from."""

    config: RunConfig
    arguments: ExperimentArguments
    begins: ContinuedRun | None = None

    @property
    def name(self) -> str:
        """The run's name."""
        return self.config.name

    def steps(self) -> tuple[Step, ...]:
        """Its steps by kind and name. No source is looked at, so they are good for nothing else."""
        train = self.config.train.model_copy(update={"initialize_from_checkpoint_path": None, "initialize_from_hf": None})
        unlisted = [dataset.name for dataset in self.config.data.datasets if dataset.has_files]
        return run_steps(self.config.model_copy(update={"train": train}), unlisted=unlisted).all

    @property
    def plannable(self) -> RunConfig:
        """The run as far as it can be planned now."""
        if self.begins is None or self.begins.is_ready(root_place(self.arguments.root)):
            return self.config
        train = self.config.train.model_copy(update={"initialize_from_checkpoint_path": None})
        return self.config.model_copy(update={"train": train})


def run_experiments(steps: Sequence[RunConfig | ContinuedRun], description: str, arguments: list[str]) -> int:
    """Plans, deploys or runs what a file declares; returns the exit status."""
    return named_errors(lambda: _run(declared_runs(steps, description, arguments), description))


def declared_runs(steps: Sequence[RunConfig | ContinuedRun], description: str, arguments: list[str]) -> list[Declared]:
    """The runs with their flags; one that others go on from comes before them, whether the file lists it or not.

    Raises:
        ValueError: there is none, or two have one name.
    """
    runs: dict[str, Declared] = {}

    def add(run: RunConfig, begins: ContinuedRun | None = None) -> Declared:
        flags = parse(ExperimentArguments(config=run), arguments, prog=run.name, description=description or "An experiment.")
        config = flags.config
        if flags.text:
            config = config.model_copy(update={"data": own_text_mixture(flags.text, config.data.tokenizer, flags.reading)})
        made = Declared(config, flags, begins)
        if (other := runs.setdefault(run.name, made)).config != config:
            raise ValueError(f"two runs of this file are named {run.name!r}: directories and trackers would mix them up, so rename one")
        return other

    for step in steps:
        if isinstance(step, RunConfig):
            add(step)
            continue
        base = add(step.base)
        begins = dataclasses.replace(step, base=base.config)
        add(begins.begun(root_place(base.arguments.root)), begins)
    if not runs:
        raise ValueError("executor_main(steps=[]) has nothing to run: give it what default_train returned")
    return list(runs.values())


def _run(runs: list[Declared], description: str) -> int:
    arguments = runs[0].arguments
    if arguments.max_concurrent < 1:
        raise ValueError(f"--max-concurrent={arguments.max_concurrent}: give how many runs may be under way at once, 1 or more")
    root = root_place(arguments.root)
    chosen = _chosen(runs)
    needs = {run.name: run.begins.base.name for run in chosen if run.begins is not None}
    # all are checked, and shown, before the first one trains
    plans = [_plan(run, root, to_read=arguments.plan) for run in chosen]
    if arguments.plan:
        for plan in plans:
            print_preflight(plan)
        return 0
    if arguments.deploy is not None:
        from flows.deploying import deploy

        for run in chosen:
            if run.plannable is not run.config:
                raise ValueError(f"--deploy: {run.name} goes on from {needs[run.name]}, which is not trained yet: run the file first")
            console.print(deploy(run.config, arguments.deploy, root, description), markup=False)
        return 0
    for run, plan in zip(chosen, plans, strict=True):
        check_accelerator(run.name, plan.model, run.config.train, tell=tell, pool=run.config.pool)
    prepare_prefect()
    outcomes = run_all({run.name: lambda run=run: _launch(run, str(root), description) for run in chosen}, needs, arguments.max_concurrent)
    _report(outcomes, arguments)
    return exit_status(outcomes)


def _launch(run: Declared, root: str, description: str) -> list[Artifact]:
    return launch(run.config, root, run.arguments.only, _matched(run.steps(), run.arguments.force), description=description)


def _chosen(runs: list[Declared]) -> list[Declared]:
    """The runs that take part. Raises ValueError where --only or --force finds no step of any of them."""
    arguments = runs[0].arguments
    steps = tuple(step for run in runs for step in run.steps())
    for pattern in arguments.force:
        matching(steps, pattern, "--force")
    if arguments.only is None:
        return runs
    matching(steps, arguments.only, "--only")
    found = [run for run in runs if _matched(run.steps(), (arguments.only,))]
    needed = {run.begins.base.name for run in found if run.begins is not None}
    return [run for run in runs if run in found or run.name in needed]


def _matched(steps: Sequence[Step], patterns: Sequence[str]) -> tuple[str, ...]:
    """The patterns that find one of the steps."""
    return tuple(pattern for pattern in patterns if any(re.search(pattern, label(step)) for step in steps))


def _plan(run: Declared, root: Place, *, to_read: bool) -> Plan:
    steps, arguments = run.steps(), run.arguments
    only = arguments.only if arguments.only is not None and _matched(steps, (arguments.only,)) else None
    plan = plan_run(run.plannable, root, only=only, force=_matched(steps, arguments.force), to_read=to_read)
    print_plan(plan)
    if run.plannable is not run.config:
        assert run.begins is not None
        console.print(f"  {'begins':<8} with the last checkpoint of {run.begins.base.name}, which is trained first", markup=False)
    return plan


def _report(outcomes: list[Outcome[list[Artifact]]], arguments: ExperimentArguments) -> None:
    from tasks.summary import RunSummary

    for outcome in outcomes:
        if outcome.result is not None and (summary := RunSummary.of(outcome.result)) is not None:
            print_summary(summary)
        elif outcome.state == "stopped":
            print(f"stopped: {outcome.name}: {how_to_continue(KeyboardInterrupt(outcome.why), arguments.force)}", file=sys.stderr)
        elif outcome.state != "done":
            print(f"error: {outcome.name}: {outcome.why}", file=sys.stderr)
    if len(outcomes) > 1 or outcomes[0].state == "failed":
        print_table(("run", "", "steps that failed", "steps that need them", "why"), [outcome.row() for outcome in outcomes])
