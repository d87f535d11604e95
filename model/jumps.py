"""Where a run's data leaves its order: rows that were left out, as they are written down beside its checkpoints. Without JAX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from model.buckets import write_everywhere

SKIPPED_DATA = "skipped-data.json"


class Jump(NamedTuple):
    """From step `step` on, the data is `rows` further than it would be; before is where it is negative."""

    step: int
    rows: int


def read_skipped_data(directory: Path) -> tuple[Jump, ...]:
    """The jumps over data that broke or spoiled the training, as `skip_data` keeps them; none where there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    return tuple(Jump(one["step"], one["rows"]) for one in _entries(directory))


def num_rollbacks(directory: Path) -> int:
    """How often the run went back by itself."""
    return sum(not one.get("asked_for", False) for one in _entries(directory))


def skip_data(directory: Path, step: int, rows: int, why: str, *, asked_for: bool = False) -> None:
    """Writes down that from `step` on the data is `rows` further: every process that begins after this knows.

    Args:
        directory: the run's.
        asked_for: by a person, so it does not count to those that `train.max_rollbacks` allows.

    Raises:
        ValueError: the file is damaged.
    """
    entry = {"step": step, "rows": rows, "why": why, "asked_for": asked_for}
    write_everywhere(directory / SKIPPED_DATA, {"skipped": [*_entries(directory), entry]})


def _entries(directory: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads((directory / SKIPPED_DATA).read_text(encoding="utf-8"))
        return [{**one, "step": int(one["step"]), "rows": int(one["rows"])} for one in content["skipped"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / SKIPPED_DATA} cannot be read ({error}): restore it, or the data that follows is unknown") from None
