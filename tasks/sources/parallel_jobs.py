"""Jobs on threads that end when they are told to, also where one of them hangs in a call that nobody can interrupt."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from tasks.children import ChildStopped, stopping

T = TypeVar("T")
_TICK_SECONDS = 0.1
# How long the end of the jobs waits for threads that may hang. They write nothing after it: see `Control.guarded`.
_LEAVE_SECONDS = 1.0


class Control:
    """Ends a group of jobs: because the run is stopped, or one of them failed.

    what: names the group in the message of the ChildStopped that the jobs get.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._cancelled = threading.Event()
        self._changes: set[threading.Lock] = set()
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises ChildStopped when it is time to end."""
        if self._cancelled.is_set() or stopping():
            raise ChildStopped(f"{self._what} was stopped; what has arrived is kept: run the same command again to go on")

    def wait(self, seconds: float) -> None:
        """Sleeps. Raises ChildStopped as soon as it is time to end."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._cancelled.wait(min(left, _TICK_SECONDS))
            self.check()
        self.check()

    def new_lock(self) -> threading.Lock:
        """A lock to hold while a file is changed, with `check` called first: `cancel` returns when no change is under way any more."""
        with self._lock:
            self._changes.add(lock := threading.Lock())
        return lock

    def cancel(self) -> None:
        """Ends the jobs. From its return on, none of them changes a file, whether its thread still lives or not."""
        self._cancelled.set()
        with self._lock:
            locks = list(self._changes)
        for lock in locks:
            with lock:
                pass


def in_parallel(
    jobs: Sequence[Callable[[], T]], control: Control, *, workers: int, tick: Callable[[], None] = lambda: None
) -> Generator[tuple[int, T], None, None]:
    """The index and the result of each job as they finish; `tick` is called ten times a second, on the caller's thread.

    The first job that raises ends the others, and its exception is raised here. Raises ChildStopped when the run is stopped.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, T | None, BaseException | None]] = queue.SimpleQueue()
    for index in range(len(jobs)):
        todo.put(index)

    def work() -> None:
        while True:
            try:
                index = todo.get_nowait()
            except queue.Empty:
                return
            try:
                control.check()
                done.put((index, jobs[index](), None))
            except BaseException as error:
                done.put((index, None, error))
                return

    # daemon threads: one that hangs must not keep the interpreter from ending
    threads = [threading.Thread(target=work, daemon=True, name=f"download-{number}") for number in range(min(workers, len(jobs)))]
    for thread in threads:
        thread.start()
    try:
        for _ in jobs:
            yield _next(done, control, tick)
    finally:
        control.cancel()
        until = time.monotonic() + _LEAVE_SECONDS
        for thread in threads:
            thread.join(max(until - time.monotonic(), 0.0))


def _next(done: queue.SimpleQueue[tuple[int, T | None, BaseException | None]], control: Control, tick: Callable[[], None]) -> tuple[int, T]:
    while True:
        tick()
        try:
            index, value, error = done.get(timeout=_TICK_SECONDS)
        except queue.Empty:
            control.check()
            continue
        if error is not None:
            raise error
        return index, value  # pyright: ignore[reportReturnType]
