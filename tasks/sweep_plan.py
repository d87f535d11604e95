"""The plan of a sweep: its arms, which of them the budget has room for, and what is there already; without Prefect or JAX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tasks.experiment import root_place
from tasks.formatting import duration, flops, number, size
from tasks.places import Place
from tasks.planning import Plan, plan_run
from tasks.storage import free_bytes
from tasks.sweep_budget import Budget, arms_within
from tasks.sweep_config import Arm, Sweep
from tasks.sweep_table import SweepTable


@dataclass(frozen=True)
class PlannedSweep:
    """Every arm with its plan, and whether it takes part."""

    arms: tuple[Arm, ...]
    plans: tuple[Plan, ...]
    taken: tuple[bool, ...]
    table: SweepTable

    @property
    def taken_plans(self) -> tuple[Plan, ...]:
        """Of the arms that take part, in their order."""
        return tuple(plan for plan, runs in zip(self.plans, self.taken, strict=True) if runs)

    def lines(self) -> list[str]:
        """What the arms that take part amount to, as `name: value`."""
        plans = self.taken_plans
        seconds = [plan.seconds for plan in plans]
        known = [each for each in seconds if each is not None]
        return [
            f"arms: {len(plans)} of {len(self.plans)}, {sum(map(_is_there, plans))} of them there already",
            f"tokens: {number(sum(plan.total_tokens for plan in plans))} in all",
            f"compute: {flops(sum(plan.total_flops for plan in plans))} of model work",
            *([f"time: about {duration(sum(known))} of training on this machine"] if len(known) == len(plans) else []),
            f"table: {self.table.place}",
        ]

    def rows(self) -> list[tuple[str, ...]]:
        """`(arm, value of each field ..., action, why)`."""
        found = []
        for row, plan in zip(self.table.rows, self.plans, strict=True):
            action, why = ("reuse", row.place) if _is_there(plan) else ("run", _training(plan))
            found.append((row.name, *row.values.values(), *((action, why) if row.state == "waiting" else (row.state, row.why))))
        return found


def plan_sweep(sweep: Sweep, root: str | Place | None, *, budget: str | None, fit: bool, tell: Callable[[str], None]) -> PlannedSweep:
    """The plan of a sweep. Everything that can be known to fail does so here.

    Raises:
        ValueError, OSError: naming the field, arm, budget or place, and what to do.
    """
    limit = None if budget is None else Budget.parse(budget)
    place = root_place(root) if root is None or isinstance(root, str) else root
    arms = sweep.arms()
    plans = tuple(plan_run(arm.config, place) for arm in arms)
    taken = tuple(arms_within(limit, plans, fit=fit, tell=tell))
    planned = PlannedSweep(arms, plans, taken, SweepTable.of(sweep.base.name, arms, plans, taken, place))
    if isinstance(place, Path):
        _check_space(place, planned.taken_plans)
    return planned


def _check_space(root: Path, plans: tuple[Plan, ...]) -> None:
    """Each plan was held against the disk by itself; here all are together."""
    needed, free = sum(plan.checkpoint_bytes for plan in plans if not _is_there(plan)), free_bytes(root)
    if needed > free:
        raise ValueError(
            f"--root={root} has {size(free)} free, the arms' checkpoints need up to {size(needed)}: free some space, choose another "
            "--root, or set train.max_checkpoints lower"
        )


def _is_there(plan: Plan) -> bool:
    return all(planned.action == "reuse" for planned in plan.steps)


def _training(plan: Plan) -> str:
    return next((planned.why for planned in plan.steps if planned.step.kind == "checkpoints" and planned.action == "run"), "its export")
