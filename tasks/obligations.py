"""What a run owes at certain steps, evaluations by lm-eval, and what of it is done: `obligations.json` in the run's directory.

An obligation is written down when a checkpoint has reached its step and stays until it is met, through kills, failures and changes
of the cadence. What was met is also in `evals.jsonl`, a line a step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from model.config_base import Config
from tasks.config import EvalHarnessConfig
from tasks.json_files import read_json, write_json, write_text
from tasks.places import Place

OBLIGATIONS = "obligations.json"
EVALS = "evals.jsonl"


class Obligation(Config):
    """The evaluation of one checkpoint; `metrics` once it is done, else perhaps why it failed when it was last tried."""

    step: int
    harness: EvalHarnessConfig
    metrics: dict[str, float] | None = None
    error: str | None = None

    @property
    def key(self) -> tuple[int, tuple[str, ...], int | None]:
        """What tells it from others of the run."""
        return self.step, self.harness.tasks, self.harness.limit


def due_steps(harness: EvalHarnessConfig, num_train_steps: int) -> list[int]:
    """The steps whose checkpoints are evaluated: multiples of `steps`, and the last; none where there are no tasks."""
    if not harness.tasks:
        return []
    return [*range(harness.steps, num_train_steps, harness.steps), num_train_steps]


class Ledger:
    """The obligations of one run, read at the start and written at every change."""

    def __init__(self, run: Place) -> None:
        """`run`: the run's directory. Raises ValueError where the file is damaged, StorageError."""
        self._run = run
        found = read_json(run / OBLIGATIONS) or {}
        self._by_key = {one.key: one for one in map(Obligation.model_validate, found.get("obligations", []))}

    @property
    def all(self) -> list[Obligation]:
        """Every obligation, by step."""
        return sorted(self._by_key.values(), key=lambda one: (one.step, one.key[1], one.harness.limit or 0))

    @property
    def due(self) -> list[Obligation]:
        """Those that are not met."""
        return [one for one in self.all if one.metrics is None]

    def owe(self, steps: Iterable[int], harness: EvalHarnessConfig) -> None:
        """Writes down that these steps have to be evaluated; what is there already stays as it is."""
        new = [one for one in (Obligation(step=step, harness=harness) for step in steps) if one.key not in self._by_key]
        if new:
            self._by_key |= {one.key: one for one in new}
            self._write()

    def met(self, obligation: Obligation, metrics: dict[str, float]) -> None:
        """It is done."""
        self._set(obligation.model_copy(update={"metrics": metrics, "error": None}))
        write_text(self._run / EVALS, "".join(json.dumps(row) + "\n" for row in self.rows()))

    def failed(self, obligation: Obligation, error: str) -> None:
        """It is still owed; why it failed is kept."""
        self._set(obligation.model_copy(update={"error": error}))

    def rows(self) -> list[dict[str, Any]]:
        """The lines of `evals.jsonl`: `{"step": ..., "lm_eval/<task>/<metric>": ...}`, one for each obligation that is met."""
        return [{"step": one.step, **one.metrics} for one in self.all if one.metrics is not None]

    def _set(self, obligation: Obligation) -> None:
        self._by_key[obligation.key] = obligation
        self._write()

    def _write(self) -> None:
        write_json(self._run / OBLIGATIONS, {"schema": 1, "obligations": [one.model_dump(mode="json") for one in self.all]})
