"""Which rows of the data each step trains on: a batch after the other, but for ranges that were left out.

Row i of the run is a function of the mixture and the seed (`model.order`), so all that a run decides is where in that order a
step stands. A jump moves all later steps: forward over rows that broke the training, or back to the beginning where weights of
another run go on with data of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Sharding

from model.batches import BatchLoader
from model.feed import held_rows, place
from model.jumps import Jump


class DataPosition:
    """The batches of a run, each on the devices that hold it; `batch` is a pure function of its step."""

    def __init__(self, loader: BatchLoader, sharding: Sharding, jumps: Sequence[Jump] = ()) -> None:
        self.loader = loader
        self.jumps = tuple(sorted(jumps))
        self._sharding = sharding

    def first_row(self, step: int) -> int:
        """Number, in the run's order, of the first row of `step`'s batch (steps count from 0)."""
        return self.loader.batch_sizes.rows_before(step) + sum(jump.rows for jump in self.jumps if jump.step <= step)

    def batch(self, step: int) -> dict[str, jax.Array]:
        """The batch of `step` as global arrays [B,S]; this process reads the rows that its devices hold."""
        first, size = self.first_row(step), self.loader.batch_sizes.size_at(step)
        start, stop = held_rows(self._sharding, (size, self.loader.seq_len))
        rows = self.loader.rows(first + start, first + stop)
        return place(rows, self._sharding, first_row=start, num_rows=size)

    def describe(self, step: int) -> str:
        """`rows 512 to 575 (plays 40, sonnets 24)`: what `step`'s batch was made of."""
        first, size = self.first_row(step), self.loader.batch_sizes.size_at(step)
        component_B, _, _ = self.loader.order.rows(first, first + size)
        names = [component.name for component in self.loader.order.components]
        counts = [(name, int((component_B == index).sum())) for index, name in enumerate(names)]
        return f"rows {first:,} to {first + size - 1:,} ({', '.join(f'{name} {count}' for name, count in counts if count)})"

    def state(self, next_step: int) -> dict[str, Any]:
        """All that a checkpoint holds of the data: what the order is a function of, and where the next step stands in it."""
        return {**self.loader.state(next_step), "next_row": self.first_row(next_step)}

    def check(self, state: Mapping[str, Any] | None, step: int, last_step: int) -> None:
        """Raises ValueError where a checkpoint of `step` is of other data or another order of it, or the data ends before `last_step`."""
        if state is not None:
            self.loader.check_state(state, step)
        self.loader.check_rows(self.first_row(last_step - 1) + self.loader.batch_sizes.size_at(last_step - 1))
