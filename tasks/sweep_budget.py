"""What a sweep may cost in all: FLOPs, hours or dollars, held against its plans before anything starts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from pydantic import Field

from model.config_base import Config, nearest
from tasks.formatting import flops, number
from tasks.planning import Plan
from tasks.preflight import preflight

Unit = Literal["FLOPs", "hours", "dollars"]
_AMOUNT = re.compile(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]+)\s*")


class Budget(Config):
    """The most that all arms together may cost, those included that are finished already: the same command keeps to it again."""

    amount: float = Field(gt=0)
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From `3hours`, `200dollars` or `1e18FLOPs`. Raises ValueError for anything else."""
        found, units = _AMOUNT.fullmatch(text), get_args(Unit)
        by_name = {unit.lower(): unit for unit in units}
        if found is None or found[2].lower() not in by_name:
            near = "" if found is None else nearest(found[2], list(units))
            raise ValueError(f"budget={text!r}{near}: write an amount with its unit, such as 3hours, 200dollars or 1e18FLOPs")
        return cls(amount=float(found[1]), unit=by_name[found[2].lower()])

    def write(self, amount: float) -> str:
        """`12.3 EFLOP`, `1.5 hours`, `20 dollars`."""
        return flops(amount) if self.unit == "FLOPs" else f"{number(amount)} {self.unit}"

    def cost(self, plan: Plan, *, tell: Callable[[str], None]) -> float:
        """What one run costs in this unit: model FLOPs; hours of training here or, with dollars, on its slice as preflight bounds them.

        Raises:
            ValueError: that cannot be known here.
        """
        if self.unit == "FLOPs":
            return plan.total_flops
        if self.unit == "hours" and plan.seconds is not None:
            return plan.seconds / 3600
        train = plan.config.train
        if train.accelerator_type is None:
            why = "this machine has no price" if self.unit == "dollars" else "how fast this machine's accelerator is, is not known"
            raise ValueError(f"budget in {self.unit}: {why}: give it in FLOPs, or set train.accelerator_type to a TPU slice")
        found = preflight(plan.config.name, plan.model, train, tell=tell)
        cost = None if found is None else (found.hours if self.unit == "hours" else found.dollars)
        if cost is None:
            raise ValueError(f"budget in {self.unit}: preflight does not know them for {train.accelerator_type}: give it in FLOPs")
        return cost


def arms_within(budget: Budget | None, plans: Sequence[Plan], *, fit: bool, tell: Callable[[str], None]) -> list[bool]:
    """For each plan whether it takes part; all do where the budget has room for them.

    fit: leave out the arms that have no more room, in their order, instead of refusing them all.

    Raises:
        ValueError: together they cost more than the budget, with the numbers; or not even one fits.
    """
    if budget is None:
        return [True] * len(plans)
    costs = [budget.cost(plan, tell=tell) for plan in plans]
    total, taken, spent = sum(costs), [], 0.0
    for cost in costs:
        taken.append(spent + cost <= budget.amount)
        spent += cost if taken[-1] else 0.0
    said = f"budget={budget.write(budget.amount)}: the {len(plans)} arms need about {budget.write(total)}"
    if not any(taken):
        raise ValueError(f"{said}, the smallest {budget.write(min(costs))}: raise the budget, or take fewer steps or smaller models")
    if not all(taken) and not fit:
        raise ValueError(
            f"{said}, {sum(taken)} of them {budget.write(spent)}: raise the budget, take fewer arms, or have only those run that fit "
            "(--fit-budget)"
        )
    tell(f"budget {budget.write(budget.amount)}: {sum(taken)} of {len(plans)} arms, about {budget.write(spent)}")
    return taken
