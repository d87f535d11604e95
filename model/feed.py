"""Batches on the devices before the step asks for them."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Sharding


class Loader(Protocol):
    """Anything that gives this process's rows of the batch of a step."""

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The rows, as arrays [B,S]."""
        ...


def place(batch: dict[str, np.ndarray], sharding: Sharding) -> dict[str, jax.Array]:
    """This process's rows as part of global arrays [B,S]."""
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


class BatchFeed:
    """Reads ahead in one background thread, so that the loader's time hides behind the step's."""

    def __init__(self, loader: Loader, sharding: Sharding, *, first_step: int, end_step: int, ahead: int = 2) -> None:
        self._loader, self._sharding, self._end = loader, sharding, end_step
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._queue: deque[Future[Any]] = deque()
        self._next = first_step
        self.waited_seconds = 0.0
        for _ in range(ahead):
            self._read_one_more()

    def _read_one_more(self) -> None:
        if self._next < self._end:
            self._queue.append(self._pool.submit(self._loader.batch, self._next))
            self._next += 1

    def take(self) -> dict[str, jax.Array]:
        """The next step's batch. `waited_seconds` says how long this call waited for the loader."""
        began = time.perf_counter()
        rows = self._queue.popleft().result()
        self.waited_seconds = time.perf_counter() - began
        self._read_one_more()
        return place(rows, self._sharding)

    def close(self) -> None:
        """Stops reading ahead."""
        self._pool.shutdown(wait=False, cancel_futures=True)
