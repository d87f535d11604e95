"""Experiment trackers on request. Each works in a thread of its own behind a bounded queue: none can stop, fail or slow a run.

    trackers = open_trackers(("wandb",), directory, run_id=..., name=..., tags=..., config=...)
    for tracker in trackers:
        tracker.begin(rows, resume_step)      # rows: what metrics.jsonl holds; those that a tracker lacks are sent again
    tracker.log(step, metrics)                # returns at once, whatever the service does
    tracker.sync()                            # at a checkpoint: what is sure to be delivered is noted
    close_trackers(trackers)                  # waits 30 s at most

What a service is sure to have is in `trackers.json` (`model.deliveries`), so after a kill nothing is lost: a row may be sent
twice, never not at all. The services themselves are in `model.tracker_services`.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from model.deliveries import Deliveries
from model.secret_text import without_secrets
from model.tracker_services import SERVICES, Service, Session

TrackerName = Literal["wandb", "tensorboard", "trackio"]
PACKAGES: dict[str, str] = {"wandb": "wandb", "tensorboard": "tensorboardX", "trackio": "trackio"}

CAPACITY = 1000  # rows that wait for a service; at a row every 10 s nearly three hours of it being away
CLOSE_SECONDS = 30.0

Row = tuple[int, dict[str, Any]]
Tell = Callable[[str], None]

_logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where metrics go besides metrics.jsonl. No method waits for a service, but for `wait`."""

    def begin(self, rows: Sequence[dict[str, Any]], resume_step: int) -> None:
        """Starts; `rows` of earlier attempts, up to `resume_step`, are sent again where they may be missing."""
        ...

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes the metrics of one step."""
        ...

    def sync(self) -> None:
        """Asks for a note of what was delivered."""
        ...

    def end(self) -> None:
        """No more rows will come."""
        ...

    def wait(self, deadline: float) -> bool:
        """Waits until all is delivered, not beyond `deadline` of `time.monotonic`. Whether it ended."""
        ...


def check_trackers(names: tuple[TrackerName, ...]) -> None:
    """Refuses a tracker whose package is missing, before any work starts.

    Raises:
        ValueError: naming the package and the extra that installs it.
    """
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ValueError(
                f"track={name!r} needs the package {PACKAGES[name]!r}, which is not installed: pip install 'prefect-llama[track]'"
            )


def open_trackers(
    names: tuple[TrackerName, ...],
    directory: Path,
    *,
    run_id: str,
    name: str,
    tags: tuple[str, ...],
    config: Any,
    tell: Tell = _logger.warning,
) -> list[Tracker]:
    """The trackers asked for. Their failures are messages to `tell`, one each, not the end of the run."""
    deliveries = Deliveries(directory / "trackers.json", tell)
    session = Session(directory=directory, run_id=run_id, name=name, tags=tags, config=config, tell=tell)
    return [TrackerThread(tracker, SERVICES[tracker], session, deliveries) for tracker in names]


def close_trackers(trackers: Iterable[Tracker], seconds: float = CLOSE_SECONDS) -> bool:
    """Delivers what is left, waiting at most `seconds` for all together. False where one is given up: its thread may hang for ever."""
    trackers = list(trackers)
    for tracker in trackers:
        tracker.end()
    deadline = time.monotonic() + seconds
    ended = [tracker.wait(deadline) for tracker in trackers]
    return all(ended)


class TrackerThread:
    """Hands rows to one service. A failure is told once; from then on the rows are in metrics.jsonl alone, until the next attempt."""

    def __init__(
        self,
        name: str,
        open_service: Callable[[Session], Service],
        session: Session,
        deliveries: Deliveries,
        *,
        capacity: int = CAPACITY,
    ) -> None:
        self.name, self._open, self._session, self._deliveries = name, open_service, session, deliveries
        self._capacity = capacity
        self._changed = threading.Condition()
        self._queue: deque[Row] = deque()
        self._again: deque[Row] = deque()
        self._handed = 0  # newest step that the service took
        self._marks: deque[tuple[float, int]] = deque()  # when it was asked to sync, and what it had been handed by then
        self._sync_asked = self._ending = self._failed = self._dropped = False
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)

    @property
    def delivered(self) -> bool:
        """Whether it ended with every row that it was given."""
        return not (self._failed or self._dropped or self._thread.is_alive())

    def begin(self, rows: Sequence[dict[str, Any]], resume_step: int) -> None:
        """Starts the thread, which opens the service."""
        delivered = self._deliveries.step(self.name)
        self._handed = min(delivered, resume_step)
        if self._handed < delivered:  # it went back: the rows from there on are others, and none of them was delivered
            self._deliveries.note(self.name, self._handed)
        self._again.extend(_without_step(row) for row in rows if row["step"] > self._handed)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Puts a row into the queue; a full one loses its oldest, which the next attempt sends again."""
        with self._changed:
            if self._failed:
                return
            full = len(self._queue) == self._capacity
            if full:
                self._queue.popleft()
            first_drop, self._dropped = full and not self._dropped, full or self._dropped
            self._queue.append((step, metrics))
            self._changed.notify()
        if first_drop:
            self._tell(f"is {self._capacity} rows behind, so it loses the oldest: metrics.jsonl has them all")

    def sync(self) -> None:
        """Asks the thread to note what the service is sure to have."""
        with self._changed:
            self._sync_asked = True
            self._changed.notify()

    def end(self) -> None:
        """Lets the thread end once the queue is empty."""
        with self._changed:
            self._ending = True
            self._changed.notify()

    def wait(self, deadline: float) -> bool:
        """Waits for the thread; says what was not delivered where it does not end in time."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if not self._thread.is_alive():
            return True
        with self._changed:
            left, self._failed = len(self._queue) + len(self._again), True
            self._queue.clear()
            self._again.clear()
        self._tell(f"does not finish, so it is given up: rows after step {self._handed} ({left} of them waiting) are in metrics.jsonl only")
        return False

    def _run(self) -> None:
        try:
            service = self._open(
                self._session.to_start_at(self._handed + 1, lambda at_least: self._deliveries.reserve_rows(self.name, at_least))
            )
        except Exception as error:
            self._fail("did not start", error)
            return
        try:
            while (item := self._next()) is not None:
                if isinstance(item, tuple):
                    step, metrics = item
                    service.log(step, {key: _number(value) for key, value in metrics.items()})
                    self._handed = max(self._handed, step)
                else:
                    service.flush()
                    self._marks.append((time.monotonic(), self._handed))
                    self._note_settled(service.settle_seconds)
            service.close()
            self._note(self._handed)
        except Exception as error:
            self._fail("stopped working", error)

    def _next(self) -> Row | bool | None:
        """The next row, True for a sync that was asked for, None at the end."""
        with self._changed:
            while True:
                if self._sync_asked and not self._again:
                    self._sync_asked = False
                    return True
                if self._again:
                    return self._again.popleft()
                if self._queue:
                    return self._queue.popleft()
                if self._ending:
                    return None
                self._changed.wait()

    def _note_settled(self, seconds: float) -> None:
        sure: int | None = None
        while self._marks and self._marks[0][0] <= time.monotonic() - seconds:
            sure = self._marks.popleft()[1]
        if sure is not None:
            self._note(sure)

    def _note(self, step: int) -> None:
        # One that was given up notes nothing: in a run that goes back, the next attempt's thread is at work in this process.
        if not self._dropped and not self._failed:
            self._deliveries.note(self.name, step)

    def _fail(self, how: str, error: Exception) -> None:
        with self._changed:
            given_up, self._failed = self._failed, True
            self._queue.clear()
            self._again.clear()
        if not given_up:
            self._tell(f"{how} ({error}): metrics go on to metrics.jsonl")

    def _tell(self, what: str) -> None:
        self._session.tell(without_secrets(f"{self.name} {what}"))


def _without_step(row: dict[str, Any]) -> Row:
    return row["step"], {key: value for key, value in row.items() if key != "step"}


def _number(value: Any) -> Any:
    """The number that a row holds as text because JSON has none for it; other values as they are."""
    return float(value) if value in ("nan", "inf", "-inf") else value
