"""The command line of an experiment's file: `python flows/experiments/exp1.py [--plan] [--only ...] [--max-concurrent N] [--deploy POOL]`.

Exit status: that of `flows.command_line`; 1 where any run failed, after all that could run did.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from flows.at_once import Outcome, exit_status, left_out, run_all
from flows.command_line import (
    console,
    explained,
    how_to_continue,
    named_errors,
    print_plan,
    print_preflight,
    print_summary,
    print_table,
    tell,
)
from flows.declared import Declared, ExperimentArguments, declared_runs
from flows.launching import launch, prepare_prefect
from tasks.anneal import ContinuedRun
from tasks.artifacts import Artifact
from tasks.config import RunConfig
from tasks.experiment import root_place
from tasks.pipeline import label, matching
from tasks.places import Place
from tasks.planning import Plan, plan_run
from tasks.preflight import check_accelerator
from tasks.steps import Step


def run_experiments(steps: Sequence[RunConfig | ContinuedRun], description: str, arguments: list[str]) -> int:
    """Plans, deploys or runs what a file declares; returns the exit status."""
    return named_errors(lambda: _run(declared_runs(steps, description, arguments), description))


def _run(runs: list[Declared], description: str) -> int:
    arguments = runs[0].arguments
    if arguments.max_concurrent < 1:
        raise ValueError(f"--max-concurrent={arguments.max_concurrent}: give how many runs may be under way at once, 1 or more")
    if arguments.deploy is not None:
        _refuse_beside_deploy(arguments)
    root = root_place(arguments.root)
    chosen = _chosen(runs)
    # all are checked, and shown, before the first one trains
    refused = _check_all(chosen, root)
    ready = [run for run in chosen if run.name not in refused]
    if arguments.plan or not ready:
        return 2 if refused else 0
    if arguments.deploy is not None:
        from flows.deploying import deploy_all

        for line in deploy_all([run.whole(root) for run in ready], arguments.deploy, root, description):
            console.print(line, markup=False)
        return int(bool(refused))
    prepare_prefect()
    needs = {run.name: run.base for run in ready if run.base is not None}
    done = run_all({run.name: lambda run=run: _launch(run, root, description) for run in ready}, needs, arguments.max_concurrent)
    outcomes = {**refused, **{outcome.name: outcome for outcome in done}}
    _report([outcomes[run.name] for run in chosen], arguments)
    return exit_status(list(outcomes.values()))


def _refuse_beside_deploy(arguments: ExperimentArguments) -> None:
    """Raises ValueError where flags say how to run what --deploy does not run."""
    given = {"--only": arguments.only is not None, "--force": bool(arguments.force), "--max-concurrent": arguments.max_concurrent > 1}
    if flags := [flag for flag, is_given in given.items() if is_given]:
        raise ValueError(
            f"--deploy makes deployments of whole runs and runs none, so {' and '.join(flags)} would have no effect: leave "
            f"{'them' if len(flags) > 1 else 'it'} out; `only` and `force` are parameters of a deployment's runs"
        )


def _check_all(runs: Sequence[Declared], root: Place) -> dict[str, Outcome[list[Artifact]]]:
    """Plans, shows and checks every run; those that cannot run, by name: each is told where it stands among the others.

    Raises:
        ValueError, OSError: there is one run alone, which cannot run.
    """
    refused: dict[str, Outcome[list[Artifact]]] = {}
    for run in runs:
        if run.base in refused:
            refused[run.name] = left_out(run.name, refused[run.base])
        else:
            try:
                _check(run, root)
            except (ValueError, OSError) as error:
                if len(runs) == 1:
                    raise
                refused[run.name] = Outcome(run.name, "refused", why="; ".join(explained(error)))
        if run.name in refused:
            print(f"error: {run.name}: {refused[run.name].why}", file=sys.stderr, flush=True)
    return refused


def _check(run: Declared, root: Place) -> None:
    """Plans and shows a run. Raises ValueError or OSError where it cannot run."""
    arguments = run.arguments
    plan = _plan(run, root, to_read=arguments.plan)
    if arguments.plan:
        print_preflight(plan)
    elif arguments.deploy is None and plan.has_training:
        check_accelerator(run.name, plan.model, plan.own_train, tell=tell, pool=run.config.pool)
    elif arguments.deploy is not None and not run.is_ready(root):
        raise ValueError(f"--deploy: {run.name} goes on from {run.base}, which is not trained yet: run the file first")


def _launch(run: Declared, root: Place, description: str) -> list[Artifact]:
    force = _matched(run.steps(), run.arguments.force)
    return launch(run.whole(root), str(root), run.arguments.only, force, description=description)


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
    needed = {run.base for run in found}
    return [run for run in runs if run in found or run.name in needed]


def _matched(steps: Sequence[Step], patterns: Sequence[str]) -> tuple[str, ...]:
    """The patterns that find one of the steps."""
    return tuple(pattern for pattern in patterns if any(re.search(pattern, label(step)) for step in steps))


def _plan(run: Declared, root: Place, *, to_read: bool) -> Plan:
    steps, arguments = run.steps(), run.arguments
    only = arguments.only if arguments.only is not None and _matched(steps, (arguments.only,)) else None
    plan = plan_run(run.plannable(root), root, only=only, force=_matched(steps, arguments.force), to_read=to_read, origin=run.origin(root))
    print_plan(plan)
    if not run.is_ready(root):
        console.print(f"  {'begins':<8} with the last checkpoint of {run.base}, which is trained first", markup=False)
    if run.unchanged:
        fields = ", ".join(f"train.{field}" for field in run.unchanged)
        console.print(f"  {'flags':<8} not for this run, which has it from where it begins: {fields}", markup=False)
    return plan


def _report(outcomes: list[Outcome[list[Artifact]]], arguments: ExperimentArguments) -> None:
    from tasks.summary import RunSummary

    for outcome in outcomes:
        if outcome.state == "refused":
            continue  # told when it was planned
        if outcome.result is not None and (summary := RunSummary.of(outcome.result)) is not None:
            print_summary(summary)
        elif outcome.state == "stopped":
            print(f"stopped: {outcome.name}: {how_to_continue(KeyboardInterrupt(outcome.why), arguments.force)}", file=sys.stderr)
        elif outcome.state != "done":
            print(f"error: {outcome.name}: {outcome.why}", file=sys.stderr)
    if len(outcomes) > 1 or outcomes[0].state == "failed":
        print_table(("run", "", "steps that failed", "steps that need them", "why"), [outcome.row() for outcome in outcomes])
