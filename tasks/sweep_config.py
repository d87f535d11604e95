"""A sweep: one run, and fields of it with several values each. Its arms are runs like any other, reused and resumed as they are.

Sweep(base=default_train(...), grid={"train.learning_rate": (1e-3, 3e-3), "train.weight_decay": (0.1, 0.03)})
Sweep(base=default_train(...), grid={"train.learning_rate": Span(low=1e-4, high=1e-2, log=True)}, draws=8, seed=0)
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator

from model.config_base import Config
from tasks.config import RunConfig
from tasks.sweep_fields import checked_value, in_a_name, split_values, value_at, value_of, with_changes, written

LONGEST_NAME = 64
MOST_ARMS = 1000
_DIGEST = 8
_TRIES = 20  # draws for each arm that is wanted, where many are the same


class Span(Config):
    """Every value from `low` to `high`, for a sweep that draws; whole numbers where both are."""

    low: int | float
    high: int | float
    log: bool = Field(default=False, description="Draw uniformly in the logarithm.")

    @model_validator(mode="after")
    def _check(self) -> Span:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"{self.low}:{self.high}: a span goes from a lower to a higher value, and with `log` from above 0")
        return self

    def draw(self, chance: random.Random) -> int | float:
        """One value, with at most four digits: it stands in a name and a table."""
        share = chance.random()
        value = self.low * (self.high / self.low) ** share if self.log else self.low + (self.high - self.low) * share
        if isinstance(self.low, int) and isinstance(self.high, int):
            return round(value)
        return min(max(float(f"{value:.4g}"), self.low), self.high)


Values = Span | tuple[Any, ...]


@dataclass(frozen=True)
class Arm:
    """One run of a sweep: the values of the swept fields, by dotted name, and the run itself."""

    values: dict[str, Any]
    config: RunConfig

    @property
    def name(self) -> str:
        """Of the run."""
        return self.config.name


class Sweep(Config):
    """A run and the fields that change: every combination of the values, or so many draws of them."""

    base: RunConfig
    grid: dict[str, Values] = Field(min_length=1, description="Values of each field, by its dotted name such as train.learning_rate.")
    draws: int | None = Field(default=None, ge=1, le=MOST_ARMS, description="So many random arms, instead of every combination.")
    seed: int = Field(default=0, ge=0, description="Of the draws. More draws of the same seed begin with the same arms.")

    @model_validator(mode="after")
    def _check(self) -> Sweep:
        if self.base.eval_harness.tasks:
            raise ValueError(
                "eval_harness.tasks: arms are compared by their held-out loss, no tasks are run on them: leave it out, "
                "and ask flows/harness.py about the best"
            )
        if self.base.export.hub_repo_id is not None:
            raise ValueError(
                f"export.hub_repo_id={self.base.export.hub_repo_id!r}: all arms would be pushed to one repository: leave it out, and push "
                "the best with `python flows/train.py push RUN --repo ORG/NAME`"
            )
        if (every := self.base.train.steps_per_hf_export) is not None and self.base.train.hf_export_steps:
            raise ValueError(f"train.steps_per_hf_export={every}: of arms only the last checkpoints are exported: leave it out")
        for path, values in self.grid.items():
            if isinstance(values, Span):
                if self.draws is None:
                    raise ValueError(
                        f"{path}={values.low}:{values.high} has no end of values: say how many arms to draw, or list the values"
                    )
                checked_value(path, values.low)
                checked_value(path, values.high)
                continue
            if not values:
                raise ValueError(f"{path} has no values: give at least one")
            known = [checked_value(path, value) for value in values]
            twice = [written(value) for index, value in enumerate(known) if value in known[:index]]
            if twice:
                raise ValueError(f"{path} has the value {twice[0]} twice: leave one out")
        count = math.prod(1 if isinstance(values, Span) else len(values) for values in self.grid.values())
        if self.draws is None and count > MOST_ARMS:
            raise ValueError(f"the grid has {count:,} arms, more than {MOST_ARMS:,}: take fewer values, or draw some of them")
        return self

    def arms(self) -> tuple[Arm, ...]:
        """All arms, each once, in an order that more draws do not change.

        Raises:
            ValueError: an arm contradicts itself, or there are not so many different ones to draw.
        """
        found: dict[str, Arm] = {}
        for values in self._combinations() if self.draws is None else self._drawn():
            arm = self._arm(values)
            found.setdefault(arm.name, arm)
            if len(found) == self.draws:
                break
        if self.draws is not None and len(found) < self.draws:
            raise ValueError(f"random={self.draws}: the values make only {len(found)} different arms; draw so many, or leave it out")
        return tuple(found.values())

    def _combinations(self) -> Sequence[dict[str, Any]]:
        lists = [values for values in self.grid.values() if not isinstance(values, Span)]
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*lists)]

    def _drawn(self) -> Sequence[dict[str, Any]]:
        drawn = []
        for number in range((self.draws or 0) * _TRIES):
            # Prefixed, so that each draw is its own and their number decides none of them.
            chance = random.Random(f"{self.seed}:{number}")  # noqa: S311  (no secret)
            drawn.append({path: v.draw(chance) if isinstance(v, Span) else chance.choice(v) for path, v in self.grid.items()})
        return drawn

    def _arm(self, values: dict[str, Any]) -> Arm:
        values = {path: checked_value(path, value) for path, value in values.items()}
        changes = {path: value for path, value in values.items() if value_at(self.base, path) != value}
        return Arm(values, with_changes(self.base, arm_name(self.base.name, changes), changes))


def arm_name(name: str, changes: dict[str, Any]) -> str:
    """`{name}-{field}-{value}...` of what differs from the sweep's run; what is too long is cut and ends in a digest of it.

    Other fields that a sweep has do not show: the arm is found again by another sweep that it is an arm of.
    """
    if not changes:
        return name
    last = [path.rpartition(".")[2] for path in changes]
    fields = [path if last.count(short) > 1 else short for path, short in zip(changes, last, strict=True)]
    said = [f"{field}-{written(value)}" for field, value in zip(fields, changes.values(), strict=True)]
    whole = "-".join([name, *map(in_a_name, said)])
    # A list or a minus sign loses characters in a name, so that two values could have one.
    if len(whole) <= LONGEST_NAME and all(in_a_name(text) == text for text in said):
        return whole
    digest = hashlib.sha256("\n".join(f"{path}={written(value)}" for path, value in sorted(changes.items())).encode()).hexdigest()
    return f"{whole[: LONGEST_NAME - _DIGEST - 1].rstrip('.-')}-{digest[:_DIGEST]}"


def parse_grid(words: Sequence[str]) -> dict[str, Values]:
    """The grid that `field=value,value` and `field=low:high[:log]` say.

    Raises:
        ValueError: what is wrong with which, before anything runs.
    """
    grid: dict[str, Values] = {}
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not path or not text:
            raise ValueError(f"--grid {word!r}: write field=value,value such as train.learning_rate=1e-3,3e-3, or field=low:high:log")
        if path in grid:
            raise ValueError(f"--grid {path} is there twice: give all its values at once")
        grid[path] = _span(path, text) or tuple(value_of(path, part) for part in split_values(text))
    return grid


def _span(path: str, text: str) -> Span | None:
    parts = text.split(":")
    if len(parts) not in (2, 3) or not all(map(_is_number, parts[:2])):
        return None
    if parts[2:] not in ([], ["log"]):
        raise ValueError(f"{path}={text}: write low:high, or low:high:log")
    low, high = (value_of(path, part) for part in parts[:2])
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        raise ValueError(f"{path}={text}: only numbers have a span; list the values")
    return Span(low=low, high=high, log=len(parts) == 3)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
