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


class Loader(Protocol):
    """Anything that gives this process's rows of the batch of a step."""

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The rows, as arrays [B,S]."""
        ...


def place(batch: dict[str, np.ndarray], sharding: Sharding) -> dict[str, jax.Array]:
    """This process's rows as part of global arrays [B,S]."""
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


class BatchFeed:
    """Reads ahead in one background thread, so that the loader's time, and that to the devices, hides behind the step's."""

    def __init__(self, loader: Loader, sharding: Sharding, *, first_step: int, end_step: int, ahead: int = 2) -> None:
        """Starts to make the batches of the steps [first_step, end_step), `ahead` of them before they are taken."""
        if ahead < 1:
            raise ValueError(f"ahead={ahead}: at least one batch must be made before it is taken")
        self._loader, self._sharding, self._end = loader, sharding, end_step
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
            self._queue.append((self._next, self._pool.submit(self._make, self._next)))
            self._next += 1

    def _make(self, step: int) -> dict[str, jax.Array]:
        return place(self._loader.batch(step), self._sharding)

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
