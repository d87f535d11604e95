"""Ends a process whose step never returns, and leaves what its threads were doing.

    watchdog = Watchdog(directory, minutes=15)
    watchdog.beat(step)                               # after every step: the next one has `minutes`
    with watchdog.longer("the evaluation"):           # what may take longer has 4 times that
        ...
    watchdog.close()

A hung collective or file system can be waited for without end, and a slice that does nothing costs what a working one does.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.child import HUNG, emit

LONGER = 4.0
EMIT_SECONDS = 5.0  # the parent may be what hangs


class Deadline:
    """Time that a process spent awake since the last `restart`, told by somebody who looks at short intervals.

    A look that comes much later than the one before means that the process was stopped (SIGSTOP, a debugger) or the machine
    asleep: such a gap counts as two intervals at most.
    """

    def __init__(self, interval: float, now: float) -> None:
        self._interval, self._looked = interval, now
        self.restart("start-up", float("inf"))

    def restart(self, what: str, limit: float) -> None:
        """From now on `what` has `limit` seconds."""
        self.what, self.limit, self.awake = what, limit, 0.0

    def passed(self, now: float) -> bool:
        """Looks; whether the limit is behind us."""
        self.awake += min(now - self._looked, 2 * self._interval)
        self._looked = now
        return self.awake > self.limit


class Watchdog:
    """A thread that looks whether the run still moves. It sees a hang in any call that lets other threads run, as JAX's do."""

    def __init__(self, directory: Path, *, minutes: float | None, process_index: int = 0) -> None:
        """Begins to watch; the first step may take `LONGER` times `minutes`, since it compiles. None: nothing is watched.

        Stacks go to `stacks-<step>.txt` in `directory`, with `-process-<index>` in the name where another process has the first.
        """
        self._directory, self._step = directory, 0
        self._suffix = f"-process-{process_index}" if process_index else ""
        self._first = True
        self._limit = 60 * (minutes or 0)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._interval = min(5.0, self._limit / 10)
        self._deadline = Deadline(self._interval, time.monotonic())
        self._await_step()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if minutes is not None:
            self._thread.start()

    def beat(self, step: int) -> None:
        """`step` is done; the next one has the usual time."""
        with self._lock:
            self._step, self._first = step, False
            self._await_step()

    @contextmanager
    def longer(self, what: str) -> Iterator[None]:
        """Within the block, `what` has `LONGER` times the usual time; after it the next step has the usual time."""
        with self._lock:
            self._deadline.restart(f"{what} after step {self._step}", LONGER * self._limit)
        try:
            yield
        finally:
            with self._lock:
                self._await_step()

    def _await_step(self) -> None:
        if self._first:
            self._deadline.restart("the first step of this process, with its compilation,", LONGER * self._limit)
        else:
            self._deadline.restart(f"step {self._step + 1}", self._limit)

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._interval):
            with self._lock:
                passed, what, limit = self._deadline.passed(time.monotonic()), self._deadline.what, self._deadline.limit
            if passed and not self._closed.is_set():
                try:
                    self._report(what, limit)
                finally:
                    os._exit(HUNG)

    def _report(self, what: str, limit: float) -> None:
        path = self._directory / f"stacks-{self._step}{self._suffix}.txt"
        message = (
            f"{what} did not end within {limit:g} s, so the process ended itself. What each thread was doing: {path}. Run the same "
            "command again to go on from the last checkpoint; if it only needs more time, raise train.watchdog_minutes"
        )
        telling = threading.Thread(target=_tell, args=(message, self._step, limit, path), daemon=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        try:
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        finally:  # the file system may be what is broken
            telling.start()
            telling.join(EMIT_SECONDS)


def _tell(message: str, step: int, seconds: float, path: Path) -> None:
    emit("error", type="Hung", message=message, step=step, seconds=seconds, stacks=str(path), foreseen=False)
