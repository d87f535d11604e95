"""Batches on the devices before the step asks for them."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Sharding


class BatchError(ValueError):
    """A batch could not be made; the message names its step."""


class Batches(Protocol):
    """Anything that gives the batch of a step, on the devices."""

    def batch(self, step: int) -> dict[str, jax.Array]:
        """Global arrays [B,S]."""
        ...


def place(batch: dict[str, np.ndarray], sharding: Sharding, *, first_row: int = 0, num_rows: int | None = None) -> dict[str, jax.Array]:
    """Rows [first_row, first_row + R) of a batch, arrays [R,S], as this process's part of global arrays [num_rows,S].

    They must be all that its devices hold; without num_rows they are the whole batch. Each device gets its own part, wherever
    the mesh has put it.
    """

    def part(x_RS: np.ndarray, index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # every device holds a part
        start, stop, _ = index[0].indices(num_rows or len(x_RS))
        return x_RS[(slice(start - first_row, stop - first_row), *index[1:])]

    def global_array(x_RS: np.ndarray) -> jax.Array:
        shape = (num_rows or len(x_RS), *x_RS.shape[1:])
        return jax.make_array_from_callback(shape, sharding, lambda index: part(x_RS, index))

    return {name: global_array(x) for name, x in batch.items()}


def held_rows(sharding: Sharding, shape: tuple[int, int]) -> tuple[int, int]:
    """First row, and the one after the last, that this process's devices hold of a batch [B,S]."""
    spans = [index[0].indices(shape[0]) for index in sharding.addressable_devices_indices_map(shape).values() if index is not None]
    return min(start for start, _, _ in spans), max(stop for _, stop, _ in spans)


class BatchFeed:
    """Reads ahead in one background thread, so that the loader's time, and that to the devices, hides behind the step's."""

    def __init__(self, batches: Batches, *, first_step: int, end_step: int, ahead: int = 2) -> None:
        """Starts to make the batches of the steps [first_step, end_step), `ahead` of them before they are taken."""
        if ahead < 1:
            raise ValueError(f"ahead={ahead}: at least one batch must be made before it is taken")
        self._batches, self._end = batches, end_step
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._queue: deque[tuple[int, Future[dict[str, jax.Array]]]] = deque()
        self._next = first_step
        self._takes = 0
        self._filled = 0.0
        self._occupancy = 0.0
        self.waited_seconds = 0.0
        for _ in range(ahead):
            self._read_one_more()

    def _read_one_more(self) -> None:
        if self._next < self._end:
            self._queue.append((self._next, self._pool.submit(self._batches.batch, self._next)))
            self._next += 1

    def take(self) -> dict[str, jax.Array]:
        """The next step's batch. `waited_seconds` says how long this call waited for the loader.

        Raises BatchError where the loader failed, and IndexError after the last step.
        """
        if not self._queue:
            raise IndexError(f"every batch up to step {self._end} was taken")
        self._filled += sum(made.done() for _, made in self._queue) / len(self._queue)
        self._takes += 1
        step, made = self._queue.popleft()
        began = time.perf_counter()
        try:
            batch = made.result()
        except Exception as error:
            raise BatchError(f"the batch of step {step} could not be made: {type(error).__name__}: {error}") from error
        self.waited_seconds = time.perf_counter() - began
        self._read_one_more()
        return batch

    def occupancy(self) -> float:
        """How full the queue was when batches were taken, 0 to 1, on average since this was last asked.

        Near 1 the loader keeps up; at 0 every step waits for it. With no batch taken since, the last answer again; 0 at first.
        """
        if self._takes:
            self._occupancy = self._filled / self._takes
            self._takes, self._filled = 0, 0.0
        return self._occupancy

    def close(self) -> None:
        """Stops reading ahead."""
        self._pool.shutdown(wait=False, cancel_futures=True)
