"""`metrics.jsonl`: one line a logged step, flushed to disk, cut back to the resume step after a restart."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.trackers import CLOSE_SECONDS, Tracker, close_trackers


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file that are whole. A process killed in mid-write leaves at most one torn last line."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The samples of the newest step in a `samples.jsonl`."""
    rows = read_json_lines(path)
    return [row for row in rows if row["step"] == rows[-1]["step"]]


class JsonLines:
    """An append-only JSONL file whose rows carry a `step`."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Keeps the rows of earlier attempts up to `resume_step`: later ones will be computed again."""
        self._path = path
        self._begin_with([row for row in read_json_lines(path) if row["step"] <= resume_step])

    def _begin_with(self, rows: list[dict[str, Any]]) -> None:
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(temporary, self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def replace_last(self, row: dict[str, Any]) -> None:
        """Puts `row` in the place of the last one; a kill leaves the one or the other."""
        self.close()
        self._begin_with([*read_json_lines(self._path)[:-1], row])

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row; it reaches the operating system before this returns."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Forces all rows to the disk, as a checkpoint that covers them is about to be committed."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Forces all rows to the disk and closes the file."""
        self.sync()
        self._file.close()


class MetricsLog:
    """Collects the metrics of a step from several sources into one row, for the file and the trackers."""

    def __init__(self, path: Path, resume_step: int, trackers: Sequence[Tracker]) -> None:
        """Continues the file after `resume_step` and starts the trackers, which get the rows that they lack."""
        self._lines = JsonLines(path, resume_step)
        self._trackers = trackers
        self._row: dict[str, Any] = {}
        rows = read_json_lines(path)
        self._resumed = rows[-1] if rows else {}  # what is made up for at the resume step belongs to its row
        for tracker in trackers:
            tracker.begin(rows, resume_step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Adds `metrics` to the row of `step`; a row is written when the next step's begins."""
        if self._row and self._row["step"] != step:
            self.flush()
        self._row = {**self._row, "step": step, **{key: _json_number(value) for key, value in metrics.items()}}

    def flush(self) -> None:
        """Writes the row being collected, if there is one, to the file and to every tracker."""
        if not self._row:
            return
        row, self._row = self._row, {}
        if row["step"] == self._resumed.get("step"):
            self._lines.replace_last({**self._resumed, **row})
        else:
            self._lines.write(row)
        for tracker in self._trackers:
            tracker.log(row["step"], {key: value for key, value in row.items() if key != "step"})

    def sync(self) -> None:
        """Writes and forces everything to the disk."""
        self.flush()
        self._lines.sync()
        for tracker in self._trackers:
            tracker.sync()

    def close(self, seconds: float = CLOSE_SECONDS) -> bool:
        """Writes what is left, closes the file, and waits at most `seconds` for the trackers.

        False where one of them hangs: then the process should end by `os._exit`, since its library may wait for it at exit.
        """
        self.flush()
        self._lines.close()
        return close_trackers(self._trackers, seconds)


def _json_number(value: float) -> float | int | str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN or infinity
    return value
