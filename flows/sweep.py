"""sweep-llama: one run with several values of some fields, the best of them named.

    python flows/sweep.py debug --grid train.learning_rate=1e-3,3e-3 --grid train.weight_decay=0.1,0.03
    python flows/sweep.py debug --grid train.learning_rate=1e-4:1e-2:log --random 8 --seed 1 --max-concurrent 2
    python flows/sweep.py debug --grid train.learning_rate=1e-3,3e-3 --budget 3hours --plan

Each arm is a run like any other: what is there already is reused, what was killed goes on where it was, and all share their data.
One that fails ends none of the others. The same command continues a sweep that was stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts flows/ first on the path; the packages are siblings of it. As flows/train.py does, so that --plan waits for no Prefect.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from flows.sweep_command import run_command

    sys.exit(run_command(sys.argv[1:]))

import flows.prefect_settings  # noqa: F401, I001  (before Prefect reads its settings)

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows.sweep_schedule import DATA_STEPS_AT_ONCE, RunSchedule
from tasks.artifacts import Artifact
from tasks.config import RunConfig
from tasks.experiment import resolve_run
from tasks.places import place_of
from tasks.planning import Plan
from tasks.pool_doctor import check_pool
from tasks.preflight import check_accelerator
from tasks.presets import Preset
from tasks.run_report import publish_record, publish_report
from tasks.sweep_config import Span, Sweep, parse_grid
from tasks.sweep_plan import PlannedSweep, plan_sweep
from tasks.sweep_report import publish_table
from tasks.sweep_table import SweepTable, outcome_of

__all__ = ["ArmsFailed", "Span", "Sweep", "sweep_llama"]

MOST_AT_ONCE = 32
_TASK_RUNNER: Any = ThreadPoolTaskRunner(max_workers=MOST_AT_ONCE + DATA_STEPS_AT_ONCE)


class ArmsFailed(ValueError):
    """Some arms of a sweep failed; `table` has all that came out."""

    def __init__(self, table: SweepTable) -> None:
        """The message names each with its reason."""
        failed = [f"{row.name}: {row.why}" for row in table.rows if row.state == "failed"]
        super().__init__(f"{table.headline()}; {'; '.join(failed)}. The same command runs again those that failed")
        self.table = table


def _flow_run_name() -> str:
    parameters = flow_run.parameters
    sweep = parameters.get("sweep")
    return f"sweep-llama-{sweep.base.name if isinstance(sweep, Sweep) else parameters.get('name') or parameters['preset']}"


@flow(name="sweep-llama", flow_run_name=_flow_run_name, task_runner=_TASK_RUNNER)
def sweep_llama(
    preset: Preset = Preset.DEBUG,
    name: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")] = None,
    grid: list[str] | None = None,
    random: Annotated[int | None, Field(ge=1)] = None,
    seed: Annotated[int, Field(ge=0)] = 0,
    num_train_steps: Annotated[int | None, Field(ge=1)] = None,
    train_batch_size: Annotated[int | None, Field(ge=1)] = None,
    max_concurrent: Annotated[int, Field(ge=1, le=MOST_AT_ONCE)] = 2,
    budget: str | None = None,
    fit_budget: bool = False,
    pool: str | None = None,
    root: str | None = None,
    sweep: Sweep | None = None,
) -> SweepTable:
    """Trains every arm of a sweep and returns the table of them.

    Args:
        preset: The run that all arms begin as.
        name: Name of the sweep; arms add what they change. Unset: the preset's.
        grid: Fields with their values, such as train.learning_rate=1e-3,3e-3, or with --random low:high and low:high:log.
        random: Draw so many arms. Unset: every combination of the values.
        seed: Of the draws.
        num_train_steps: Optimizer steps of every arm. Unset: the preset's.
        train_batch_size: Sequences in one optimizer step. Unset: the preset's.
        max_concurrent: Arms that train at once.
        budget: What all arms may cost together, such as 3hours, 200dollars or 1e18FLOPs; more is refused before anything starts.
        fit_budget: Run the arms that fit into the budget instead, in their order.
        pool: Work pool that trains each arm. Unset, or inline: this run itself.
        root: Where artifacts lie: a directory, or gs://bucket/prefix. Unset: PREFECT_LLAMA_ROOT, else ./artifacts.
        sweep: A whole sweep as it is declared in Python, instead of all above down to train_batch_size.

    Raises:
        ArmsFailed: when all others have finished.
    """
    if sweep is None:
        base = resolve_run(preset, name=name, num_train_steps=num_train_steps, train_batch_size=train_batch_size)
        sweep = Sweep(base=base, grid=parse_grid(grid or []), draws=random, seed=seed)
    if pool is not None:
        sweep = sweep.model_copy(update={"base": RunConfig(**{**dict(sweep.base), "pool": pool})})
    tell = get_run_logger().info
    planned = plan_sweep(sweep, root, budget=budget, fit=fit_budget, tell=tell)
    check_places(planned.taken_plans, tell)
    return run_sweep(planned, max_concurrent)


def check_places(plans: Sequence[Plan], tell: Callable[[str], None]) -> None:
    """Refuses arms that could not train where they are to: on their slice, or the work pool. Raises ValueError."""
    looked: set[tuple[str | None, int]] = set()
    for plan in plans:
        config, train = plan.config, plan.config.train
        check_accelerator(config.name, plan.model, train, tell=tell, pool=config.pool)
        slices = train.accelerator_type, train.slice_count
        if config.pool is not None and plan.trains and slices not in looked:
            looked.add(slices)  # nothing else of an arm matters to the pool
            check_pool(config.pool, plan.root, train, tell=tell)


def run_sweep(planned: PlannedSweep, max_concurrent: int) -> SweepTable:
    """Runs the arms that take part, keeping the table after every change.

    Raises:
        ArmsFailed: when all others have finished.
    """
    table, log = planned.table, get_run_logger()
    rows = [row for row in table.rows if row.state == "waiting"]
    place = place_of(table.place)

    def keep() -> None:
        table.save(place)
        publish_table(table)

    def changed(number: int, state: Any, why: str) -> None:
        row = rows[number]
        row.state, row.why = state, why
        if state == "finished":
            row.outcome = outcome_of(place_of(row.place))
            publish_report([Artifact(kind="checkpoints", name=row.name, path=row.place, fingerprint=row.fingerprint)])
        (log.error if state == "failed" else log.info)("arm %s %s%s", row.name, state, f": {why}" if why else "")
        keep()

    for plan in planned.taken_plans:
        publish_record(plan, f"An arm of the sweep {table.name}, {table.place}")
    keep()
    RunSchedule(planned.taken_plans, max_concurrent, changed).run()
    log.info(table.headline())
    if any(row.state == "failed" for row in table.rows):
        raise ArmsFailed(table)
    return table
