"""What a run is asked from outside while it goes: to save now, or to save and stop.

    touch RUN/save-now        a checkpoint after the step under way
    kill -USR1 PID            the same
    kill -TERM PID            a checkpoint, then the end (the same job continues there)

The clock asks too: a checkpoint is due some minutes after the last one. On several hosts any of them may be asked;
all of them save after the same step.
"""

from __future__ import annotations

import enum
import time
from pathlib import Path

import jax
from jax.sharding import Mesh

from model.distributed import Agreement, is_leader

SAVE_FILE = "save-now"
LOOK_SECONDS = 1.0  # how often the file is looked for: a stat costs a round trip on a network file system


class Request(enum.IntEnum):
    """The more it asks for, the larger."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


class Requests:
    """Collects what is asked and, at each step, says what all processes agreed on."""

    def __init__(self, directory: Path, mesh: Mesh, *, minutes_between_saves: float | None) -> None:
        """`directory` is the run's; `minutes_between_saves` None never asks by the clock."""
        self.agreed = Request.NOTHING
        # One flag each, written whole: a signal handler may come between any two steps of a calculation.
        self._stop = self._save = False
        self._file = directory / SAVE_FILE
        self._seconds = None if minutes_between_saves is None else 60.0 * minutes_between_saves
        self._agreement = Agreement(mesh)
        self._looks = is_leader()
        self._saved = self._looked = time.monotonic()

    def ask(self, request: Request) -> None:
        """Asks for it; called from signal handlers too."""
        if request == Request.STOP:
            self._stop = True
        elif request == Request.SAVE:
            self._save = True

    def say(self) -> jax.Array | None:
        """Tells the other processes what this one was asked, along with a step that was just started."""
        return self._agreement.say(self._wanted())

    def hear(self, said: jax.Array | None) -> None:
        """Learns what all were asked by the time `said` was said: `agreed` holds it until it is `served`."""
        self.agreed = max(self.agreed, Request(self._agreement.answer(said, self._wanted())))

    def served(self) -> None:
        """A save has begun: what asked for one is done with. A wish to stop stays."""
        self._saved = time.monotonic()
        if self._looks:
            self._file.unlink(missing_ok=True)
        self._save = False
        if self.agreed != Request.STOP:
            self.agreed = Request.NOTHING

    def _wanted(self) -> Request:
        now = time.monotonic()
        if self._looks and now - self._looked >= LOOK_SECONDS:
            self._looked = now
            if self._file.exists():
                self.ask(Request.SAVE)
            if self._seconds is not None and now - self._saved >= self._seconds:
                self.ask(Request.SAVE)
        return Request.STOP if self._stop else Request.SAVE if self._save else Request.NOTHING
