"""The feed: the loader's batches in order on the devices, how full it is, and errors that name the step."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import partitioning
from model.feed import BatchError, BatchFeed, held_rows, place


class Steps:
    """Batches that hold their step, made while `gate` is open; one of them fails."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.asked: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def batch(self, step: int) -> dict[str, jax.Array]:
        self.gate.wait(30)
        self.asked.append(step)
        if step == self.fails_at:
            raise OSError("the disk is gone")
        return {"tokens": jnp.full((2, 3), step, jnp.int32)}


def wait_for(feed: BatchFeed) -> None:
    for _, made in list(feed._queue):
        made.exception(30)


def test_batches_come_in_order_and_stop_at_the_end() -> None:
    loader = Steps()
    feed = BatchFeed(loader, first_step=5, end_step=12, ahead=3)
    for step in range(5, 12):
        batch = feed.take()
        assert batch["tokens"].tolist() == [[step] * 3] * 2
        assert feed.waited_seconds >= 0
    assert loader.asked == list(range(5, 12))
    with pytest.raises(IndexError, match="every batch up to step 12 was taken"):
        feed.take()
    feed.close()


def test_it_reads_so_many_ahead_and_no_more() -> None:
    loader = Steps()
    feed = BatchFeed(loader, first_step=0, end_step=100, ahead=3)
    wait_for(feed)
    assert loader.asked == [0, 1, 2]
    feed.take()
    wait_for(feed)
    assert loader.asked == [0, 1, 2, 3]
    feed.close()


def test_occupancy_is_how_full_the_queue_was_since_it_was_last_asked() -> None:
    loader = Steps()
    feed = BatchFeed(loader, first_step=0, end_step=100, ahead=2)
    assert feed.occupancy() == 0
    for _ in range(3):
        wait_for(feed)
        feed.take()
    assert feed.occupancy() == 1
    assert feed.occupancy() == 1
    wait_for(feed)
    feed.take()
    wait_for(feed)
    loader.gate.clear()
    feed.take()  # full again, but what follows is not made
    feed.take()  # half full
    threading.Timer(0.05, loader.gate.set).start()
    feed.take()  # empty: this one waits
    assert feed.occupancy() == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert feed.waited_seconds > 0
    feed.close()


def test_an_error_of_the_loader_names_the_step_and_comes_when_its_batch_is_due() -> None:
    feed = BatchFeed(Steps(fails_at=2), first_step=0, end_step=9)
    assert feed.take()["tokens"][0, 0] == 0
    assert feed.take()["tokens"][0, 0] == 1
    with pytest.raises(BatchError, match="the batch of step 2 could not be made: OSError: the disk is gone"):
        feed.take()
    feed.close()
    with pytest.raises(ValueError, match="ahead=0"):
        BatchFeed(Steps(), first_step=0, end_step=1, ahead=0)


def test_each_device_gets_its_rows_and_its_part_of_the_sequence() -> None:
    """A process that read only the rows its devices hold, on a mesh that splits the sequence too."""
    mesh = partitioning.make_mesh(context=2, devices=jax.devices()[:4])
    whole = {"tokens": np.arange(4 * 6, dtype=np.int32).reshape(4, 6)}
    sharding = partitioning.batch_sharding(mesh)
    np.testing.assert_array_equal(place(whole, sharding)["tokens"], whole["tokens"])
    assert held_rows(sharding, (4, 6)) == (0, 4)
