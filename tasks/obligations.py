"""What a run owes besides its training, and what of it is done: `obligations.json` in the run's directory.

Owed are evaluations by lm-eval and Hugging Face directories of the checkpoints of certain steps, and the way of the last export to the
hub. An obligation is written down when a checkpoint has reached its step and stays until it is met, through kills, failures and
changes of the cadence. The numbers of evaluations are also in `evals.jsonl`, a line a step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import TypeAdapter

from model.config_base import Config
from tasks.config import EvalHarnessConfig, ExportConfig
from tasks.json_files import read_json, write_json, write_text
from tasks.places import Place

OBLIGATIONS = "obligations.json"
EVALS = "evals.jsonl"


class Evaluation(Config):
    """The evaluation of one checkpoint: `metrics` once it is done, else perhaps why it failed when it was last tried."""

    kind: Literal["evaluation"] = "evaluation"
    step: int
    harness: EvalHarnessConfig
    metrics: dict[str, float] | None = None
    tracked: bool = False  # whether the run's trackers have the metrics too
    error: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from others of the run."""
        return self.kind, self.step, self.harness.tasks, self.harness.limit

    @property
    def is_met(self) -> bool:
        """Whether it is done."""
        return self.metrics is not None


class Export(Config):
    """The Hugging Face directory of one checkpoint: its `place` once it is made."""

    kind: Literal["export"] = "export"
    step: int
    export: ExportConfig
    place: str | None = None
    error: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from others of the run."""
        return self.kind, self.step

    @property
    def is_met(self) -> bool:
        """Whether it is done."""
        return self.place is not None


class Push(Config):
    """The way of the last export to a repository of the hub: the `commit` once it is there."""

    kind: Literal["push"] = "push"
    step: int
    export: ExportConfig  # with hub_repo_id
    commit: str | None = None
    error: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from others of the run."""
        return self.kind, self.export.hub_repo_id

    @property
    def is_met(self) -> bool:
        """Whether it is done."""
        return self.commit is not None


Obligation = Evaluation | Export | Push
_ORDER = ("export", "evaluation", "push")  # of one step
_READ: TypeAdapter[Obligation] = TypeAdapter(Obligation)


class Ledger:
    """The obligations of one run, read at the start and written at every change."""

    def __init__(self, run: Place) -> None:
        """`run`: the run's directory. Raises ValueError where the file is damaged, StorageError."""
        self._run = run
        found = read_json(run / OBLIGATIONS) or {}
        # those of earlier versions are all evaluations, and do not say so
        read = (_READ.validate_python({"kind": "evaluation", **one}) for one in found.get("obligations", []))
        self._by_key: dict[Any, Obligation] = {one.key: one for one in read}

    @property
    def all(self) -> list[Obligation]:
        """Every obligation, by step, exports first."""
        return sorted(self._by_key.values(), key=lambda one: (one.step, _ORDER.index(one.kind), repr(one.key)))

    @property
    def due(self) -> list[Obligation]:
        """Those that are not met."""
        return [one for one in self.all if not one.is_met]

    @property
    def evaluations(self) -> list[Evaluation]:
        """The evaluations that are met, by step."""
        return [one for one in self.all if isinstance(one, Evaluation) and one.is_met]

    def owe(self, obligations: Iterable[Obligation]) -> None:
        """Writes down what has to be done; what is there already stays as it is, but for exports that are wanted in another way now."""
        new = [one for one in obligations if self._is_new(one)]
        if new:
            self._by_key |= {one.key: one for one in new}
            self._write()

    def keep(self, obligation: Obligation) -> None:
        """Writes down what became of one: it is met, or why it is not."""
        self._by_key[obligation.key] = obligation
        self._write()
        if isinstance(obligation, Evaluation) and obligation.is_met:
            self._write_evals()

    def forget_after(self, step: int) -> None:
        """Drops what is of later steps, met or not."""
        left = {key: one for key, one in self._by_key.items() if one.step <= step}
        if len(left) < len(self._by_key):
            self._by_key = left
            self._write()
            self._write_evals()

    def rows(self) -> list[dict[str, Any]]:
        """The lines of `evals.jsonl`: `{"step": ..., "lm_eval/<task>/<metric>": ...}`, one for each evaluation that is met."""
        return [row_of(one) for one in self.evaluations]

    def _is_new(self, one: Obligation) -> bool:
        known = self._by_key.get(one.key)
        if known is None or isinstance(known, Evaluation) or isinstance(one, Evaluation):
            return known is None
        return known.export.identity() != one.export.identity()

    def _write_evals(self) -> None:
        write_text(self._run / EVALS, "".join(json.dumps(row) + "\n" for row in self.rows()))

    def _write(self) -> None:
        write_json(self._run / OBLIGATIONS, {"schema": 1, "obligations": [one.model_dump(mode="json") for one in self.all]})


def row_of(evaluation: Evaluation) -> dict[str, Any]:
    """One line of `evals.jsonl`."""
    return {"step": evaluation.step, **(evaluation.metrics or {})}
