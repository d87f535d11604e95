"""`trackers.json`: which rows each tracker is sure to have, so that after a kill the others are sent again.

    {"wandb": {"step": 1200, "rows": 3000}}

`step`: every row up to it was delivered. `rows`: numbers below it were given to rows, in this attempt or an earlier one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

from model.durable import write_json

ROW_BLOCK = 1000  # row numbers reserved at once, so that not every row needs a durable write


class Deliveries:
    """The record of one run, shared by its trackers' threads."""

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        """Reads it; a damaged one is told, and every row is delivered again."""
        self._path = path
        self._lock = threading.Lock()
        self._record: dict[str, dict[str, int]] = {}
        if not path.exists():
            return
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            self._record = {str(name): {"step": int(of["step"]), "rows": int(of["rows"])} for name, of in read.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            tell(f"{path} cannot be read, so the trackers are sent every row again")

    def step(self, name: str) -> int:
        """The step up to which the tracker has every row; 0 where nothing is known."""
        return self._of(name)["step"]

    def note(self, name: str, step: int) -> None:
        """The tracker has every row up to `step`. On disk when this returns."""
        self._write(name, {**self._of(name), "step": step})

    def reserve_rows(self, name: str, at_least: int) -> int:
        """The first of `ROW_BLOCK` row numbers, from `at_least` on, that no attempt has used. On disk when this returns."""
        first = max(self._of(name)["rows"], at_least)
        self._write(name, {**self._of(name), "rows": first + ROW_BLOCK})
        return first

    def _of(self, name: str) -> dict[str, int]:
        return self._record.get(name, {"step": 0, "rows": 0})

    def _write(self, name: str, of: dict[str, int]) -> None:
        with self._lock:
            self._record = {**self._record, name: of}
            write_json(self._path, self._record)
