"""How far a long data step is: one bar in a terminal, log lines where there is none, a progress artifact in the Prefect UI.

Several steps run side by side, and a terminal has room for one live display: they share it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from tasks.formatting import size
from tasks.records import run_logger

LOG_SECONDS = 15.0
UI_SECONDS = 5.0


class _Amount(ProgressColumn):
    """`1.2 GiB of 4 GiB, 30 MiB/s`, in what the bar's step counts."""

    def render(self, task: Task) -> Text:
        show: Callable[[float], str] = task.fields["show"]
        of = "" if task.total is None else f" of {show(task.total)}"
        speed = task.finished_speed or task.speed
        return Text(f"{show(task.completed)}{of}" + (f", {show(speed)}/s" if speed else ""))


class SharedDisplay:
    """One live display for the steps of this process that run side by side: there while at least one of them uses it."""

    def __init__(self, *columns: Callable[[], ProgressColumn]) -> None:
        """`columns` make those of the display, which is made anew when it was gone."""
        self._columns = columns
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._users = 0

    def add(self, label: str, total: int | None, completed: int = 0, **fields: Any) -> tuple[Progress, TaskID] | None:
        """A bar with the fields that the columns show, or None where there is no terminal."""
        console = Console(stderr=True)
        if not console.is_terminal:
            return None
        with self._lock:
            if self._progress is None:
                self._progress = Progress(*(column() for column in self._columns), console=console)
                self._progress.start()
            self._users += 1
            return self._progress, self._progress.add_task(label, total=total, completed=completed, **fields)

    def remove(self) -> None:
        """Ends the display with its last user."""
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._progress is not None:
                self._progress.stop()
                self._progress = None


def description_column() -> ProgressColumn:
    """What a bar is of."""
    return TextColumn("{task.description}")


def wide_bar() -> ProgressColumn:
    """The bar itself, over the width that is left."""
    return BarColumn(bar_width=None)


_display = SharedDisplay(description_column, wide_bar, _Amount, TimeRemainingColumn, lambda: TextColumn("{task.fields[note]}"))


class StepProgress:
    """The progress of one step, in bytes of its source or in what `show` writes. `total` None: how much there is to do is not known.

    Safe to use from several threads. What it shows is a view: a Prefect API that is away never stops the work.
    """

    def __init__(self, label: str, total: int | None, show: Callable[[float], str] = size) -> None:
        self._label, self._total, self._show = label, total, show
        self._done = 0
        self._logged = self._published = time.monotonic()
        self._bar: tuple[Progress, TaskID] | None = None
        self._artifact: UUID | None = None
        self._in_run = TaskRunContext.get() is not None
        self._lock = threading.Lock()

    def __enter__(self) -> StepProgress:
        self._bar = _display.add(self._label, self._total, note="", show=self._show)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            _display.remove()
        # a step that took no time has no artifact: it would only cost the API a call
        if self._artifact is not None and error is None:
            self._publish(100.0)

    def advance(self, done: int, note: str = "") -> None:
        """Adds `done`; `note` says what came of them so far."""
        with self._lock:
            self._done += done
            now = time.monotonic()
            if self._bar is not None:
                progress, task = self._bar
                progress.update(task, completed=self._done, note=note)
            elif now - self._logged > LOG_SECONDS:
                self._logged = now
                of = "" if self._total is None else f" of {self._show(self._total)}"
                run_logger().info("%s: %s%s%s", self._label, self._show(self._done), of, f", {note}" if note else "")
            if self._in_run and self._total and now - self._published > UI_SECONDS:
                self._published = now
                self._publish(min(100.0 * self._done / self._total, 100.0))

    def _publish(self, percent: float) -> None:
        try:
            if self._artifact is None:
                key = "progress-" + "".join(c if c.isalnum() else "-" for c in self._label.lower())
                # outside of an event loop Prefect's call is no coroutine
                self._artifact = cast("UUID", create_progress_artifact(percent, key=key, description=self._label))
            else:
                update_progress_artifact(self._artifact, progress=percent)
        except Exception as error:
            self._in_run = False
            logging.getLogger(__name__).warning("the Prefect API does not take artifacts (%s); the work goes on", error)
