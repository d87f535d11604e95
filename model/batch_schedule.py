"""How many sequences each optimizer step takes: one number, or stages of a run with a number each. Arithmetic only.

    schedule = BatchSchedule.of(32)
    schedule = BatchSchedule.of((BatchSizeStep(start=0, value=32), BatchSizeStep(start=1000, value=64)))
    schedule.size_at(1000)       # 64
    schedule.rows_before(1001)   # 32_064

A batch that grows with the run spends few tokens on the first steps, whose gradients are noisy anyway (McCandlish et al. 2018;
Llama 3, section 3.4.1). Steps count from 0, and a row is one sequence of the run's order.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from pydantic import Field

from model.config_base import Config

LARGEST = 1 << 20  # sequences in a batch: more is a slip of the pen


class BatchSizeStep(Config):
    """From one optimizer step on, batches of so many sequences."""

    start: int = Field(ge=0, description="First optimizer step with this size; that of the first stage is 0.")
    value: int = Field(ge=1, le=LARGEST, description="Sequences in one optimizer step, over all devices.")


BatchSize = int | tuple[BatchSizeStep, ...]


@dataclass(frozen=True)
class BatchSchedule:
    """Sizes by step. Everything takes as many operations as there are stages, at most."""

    stages: tuple[BatchSizeStep, ...]
    given: BatchSize  # as the configuration has it

    @classmethod
    def of(cls, given: BatchSize, field: str = "train.train_batch_size") -> BatchSchedule:
        """The schedule of a number, or of stages. `field` is what errors call it.

        Raises:
            ValueError: a number below 1; no stage, a first one that starts later than step 0, or starts that do not rise.
        """
        if isinstance(given, int):
            if given < 1:
                raise ValueError(f"{field}={given}: a batch has at least one sequence")
            if given > LARGEST:
                raise ValueError(f"{field}={given}: a batch has at most {LARGEST:,} sequences")
            return cls((BatchSizeStep(start=0, value=given),), given)
        starts = [stage.start for stage in given]
        if not starts or starts[0] != 0:
            raise ValueError(f"{field} has stages that start at steps {starts}: the first one starts at step 0")
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise ValueError(f"{field} has stages that start at steps {starts}: give them in order, each later than the one before")
        return cls(tuple(given), given)

    @cached_property
    def _starts(self) -> list[int]:
        return [stage.start for stage in self.stages]

    @cached_property
    def _rows(self) -> list[int]:
        """Rows before each stage."""
        return [0, *accumulate((after.start - stage.start) * stage.value for stage, after in pairwise(self.stages))]

    def size_at(self, step: int) -> int:
        """Sequences in the batch of `step`. Raises ValueError for a negative step."""
        return self.stages[self._stage(step)].value

    def rows_before(self, step: int) -> int:
        """Sequences in the batches of all steps before `step`, exactly. Raises ValueError for a negative step."""
        index = self._stage(step)
        return self._rows[index] + (step - self._starts[index]) * self.stages[index].value

    def steps_within(self, num_rows: int) -> int:
        """The most steps that take no more than `num_rows` sequences in all."""
        index = bisect_right(self._rows, num_rows) - 1
        return self._starts[index] + (num_rows - self._rows[index]) // self.stages[index].value

    def sizes_from(self, step: int, end: int) -> tuple[int, ...]:
        """The different sizes of the steps [step, end), in the order of their first step."""
        later = [stage.value for stage in self.stages if step < stage.start < end]
        return tuple(dict.fromkeys([self.size_at(step), *later])) if step < end else ()

    @property
    def largest(self) -> int:
        """The most sequences that any step takes: what memory has to hold."""
        return max(stage.value for stage in self.stages)

    @property
    def as_json(self) -> Any:
        """What a checkpoint records: a number as it is, stages as a list of objects."""
        return self.given if isinstance(self.given, int) else [stage.model_dump(mode="json") for stage in self.stages]

    def _stage(self, step: int) -> int:
        if step < 0:
            raise ValueError(f"step={step}: steps count from 0")
        return bisect_right(self._starts, step) - 1

    def where(self, stage: BatchSizeStep) -> str:
        """` (from step 100 on)`: which stage a message is about; nothing where there is one number."""
        return "" if isinstance(self.given, int) else f" (from step {stage.start} on)"

    def __str__(self) -> str:
        """`32`, or `32, from step 1000 on 64`."""
        first, *later = self.stages
        return ", ".join([str(first.value), *(f"from step {stage.start} on {stage.value}" for stage in later)])
