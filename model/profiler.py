"""A trace of some steps by jax.profiler, for TensorBoard's profile plugin, XProf or Perfetto. It never ends a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax


class Profiler:
    """Traces the steps of one window. Steps are counted in this process, so a resumed run can be traced too."""

    def __init__(self, directory: Path, *, enabled: bool, start_step: int, num_steps: int, tell: Callable[[str], None]) -> None:
        """`directory`: where the trace goes, once `start_step` steps are done; it ends `num_steps` later."""
        self._directory, self._tell = directory, tell
        self._begin, self._end = start_step, start_step + num_steps
        self._done = 0
        self._enabled, self._tracing = enabled, False

    def step_done(self) -> None:
        """Counts a step whose metrics were read; the trace begins or ends here."""
        self._done += 1
        if self._enabled and self._done == self._begin:
            self._tracing = self._try("start", lambda: jax.profiler.start_trace(self._directory))
        elif self._done == self._end:
            self.close()

    def close(self) -> None:
        """Ends a trace that runs, and writes it."""
        if self._tracing:
            self._tracing = False
            if self._try("write its trace", jax.profiler.stop_trace):
                self._tell(f"a trace of {min(self._done, self._end) - self._begin} steps is in {self._directory}")

    def _try(self, what: str, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:
            self._tell(f"the profiler did not {what} ({error}): training goes on without it")
            return False
        return True
