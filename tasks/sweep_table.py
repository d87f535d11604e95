"""The arms of a sweep while it goes and at its end: what each tried, how far it is, what came out; and the best of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from model.durable import json_text, write_durably
from tasks import objects
from tasks.artifacts import read_manifest
from tasks.fingerprints import fingerprint
from tasks.places import Place
from tasks.planning import Plan
from tasks.storage import make_directory
from tasks.summary import four_digits
from tasks.sweep_config import Arm
from tasks.sweep_fields import written

State = Literal["waiting", "running", "finished", "failed", "left out"]
TABLE_FILE = "sweep.json"
OUTCOME = ("train/loss", "eval/loss", "eval/bpb")


class ArmRow(BaseModel):
    """One arm. Losses in nats per token, as JSON has them ("nan" is text); None before it has finished."""

    model_config = ConfigDict(extra="forbid")

    name: str
    values: dict[str, str]
    fingerprint: str
    place: str
    state: State = "waiting"
    why: str = ""
    outcome: dict[str, float | str | None] = {}

    def score(self) -> float:
        """Held-out loss, else that of training; infinite where there is none."""
        for key in ("eval/loss", "train/loss"):
            value = self.outcome.get(key)
            if value is not None:
                return float(value) if math.isfinite(float(value)) else math.inf
        return math.inf


class SweepTable(BaseModel):
    """All arms in the order of the sweep. `place` is where it lies, `{root}/sweeps/{name}-{digits}/sweep.json`."""

    model_config = ConfigDict(extra="forbid")

    name: str
    place: str
    rows: list[ArmRow]

    @classmethod
    def of(cls, name: str, arms: Sequence[Arm], plans: Sequence[Plan], taken: Sequence[bool], root: Place) -> SweepTable:
        """Before anything runs."""
        rows = []
        for arm, plan, runs in zip(arms, plans, taken, strict=True):
            step = training_of(plan)
            rows.append(
                ArmRow(
                    name=arm.name,
                    values={path: written(value) for path, value in arm.values.items()},
                    fingerprint=step.fingerprint,
                    place=str(step.directory(root)),
                    state="waiting" if runs else "left out",
                    why="" if runs else "no room in the budget",
                )
            )
        digits = fingerprint({"arms": [row.fingerprint for row in rows], "taken": list(taken)})[:16]
        return cls(name=name, place=str(root / "sweeps" / f"{name}-{digits}" / TABLE_FILE), rows=rows)

    @property
    def best(self) -> ArmRow | None:
        """The finished arm of the lowest loss; the first of equals."""
        finished = [row for row in self.rows if row.state == "finished" and math.isfinite(row.score())]
        return min(finished, key=ArmRow.score, default=None)

    @property
    def fields(self) -> list[str]:
        """Dotted names of the fields that change."""
        return list(self.rows[0].values) if self.rows else []

    def columns(self) -> tuple[str, ...]:
        """Of `lines`; the field's names without their section where that is clear."""
        last = [path.rpartition(".")[2] for path in self.fields]
        fields = [path if last.count(short) > 1 else short for path, short in zip(self.fields, last, strict=True)]
        return ("arm", *fields, "train loss", "held-out loss", "bits per byte", "state", "run")

    def lines(self) -> list[tuple[str, ...]]:
        """The arms as text: those that finished by loss, then the others."""
        rows = sorted(self.rows, key=lambda row: (row.state != "finished", row.score()))
        return [
            (
                row.name,
                *row.values.values(),
                *(four_digits(row.outcome.get(key)) for key in OUTCOME),
                f"{row.state}: {row.why}" if row.why else row.state,
                row.place,
            )
            for row in rows
        ]

    def headline(self) -> str:
        """One line: how many finished, and the best."""
        counts = [f"{sum(row.state == 'finished' for row in self.rows)} of {len(self.rows)} arms finished"]
        for state in ("failed", "left out"):
            if count := sum(row.state == state for row in self.rows):
                counts.append(f"{count} {state}")
        if (best := self.best) is not None:
            loss = "held-out loss" if best.outcome.get("eval/loss") is not None else "train loss"
            values = ", ".join(f"{path} {value}" for path, value in best.values.items())
            counts.append(f"best {best.name} with {loss} {best.score():.4f} ({values})")
        return ", ".join(counts)

    def save(self, place: Place) -> None:
        """Writes it as JSON to `place`. Raises OSError where that cannot be."""
        data = json_text(self.model_dump(mode="json")).encode()
        if isinstance(place, Path):
            make_directory(place.parent)
            write_durably(place, data)
        else:
            objects.write(place, data, generation=None)


def training_of(plan: Plan) -> Any:
    """The training step of a plan."""
    return next(step for step in plan.wanted if step.kind == "checkpoints")


def outcome_of(place: Place) -> dict[str, float | str | None]:
    """The last losses of a finished run."""
    manifest = read_manifest(place)
    final = {} if manifest is None else manifest.stats["final"]
    return {key: final.get(key) for key in OUTCOME}
