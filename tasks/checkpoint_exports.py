"""Hugging Face directories of a run's checkpoints before its last: `hf-step-<step>/`, beside the `hf/` of the last one."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import Field

from model.checkpoint_files import COMMIT_FILE, steps_in
from model.config_base import Config
from model.metrics import read_json_lines
from tasks import objects
from tasks.artifacts import Artifact
from tasks.bucket_runs import STEP_EXPORT
from tasks.caching import StepOutput, step_task
from tasks.config import ExportConfig
from tasks.export import write_export
from tasks.json_files import read_json
from tasks.places import ObjectPath, Place
from tasks.steps import Step
from tasks.training import training_job


class CheckpointExport(Config):
    """What decides such a directory: the run, the step, and how it is written."""

    training: str = Field(description="Fingerprint of the training.")
    step: int = Field(description="Step of the checkpoint.")
    export: ExportConfig


def checkpoint_export(training: Step, step: int, export: ExportConfig) -> Step:
    """The step that exports one checkpoint of a training, which need not be done. Its input is the mixture."""
    config = CheckpointExport(training=training.fingerprint, step=step, export=export)
    return Step(kind=f"{STEP_EXPORT}{step}", name=training.name, config=config, upstream=(training.upstream[0],), subdirectory_of=training)


def export_checkpoint_body(step: Step, directory: Path, inputs: tuple[Artifact, ...]) -> StepOutput:
    """Writes what `tasks.export` writes of the last checkpoint.

    Raises:
        ChildFailed: the checkpoint is damaged or gone, or the disk is full.
    """
    training, config = step.subdirectory_of, step.config
    assert training is not None
    assert isinstance(config, CheckpointExport)
    job = training_job(training, directory.parent, inputs[0])
    stats = {"final": _final(job.bucket, directory.parent, config.step)}
    write_export(job, training, directory, config.export, config.step, stats)
    return StepOutput(stats={"dtype": config.export.dtype, "step": config.step})


def _final(bucket: str | None, directory: Path, step: int) -> dict[str, Any]:
    """The last losses up to `step`. In a bucket the curves of a run that goes on elsewhere are those in its checkpoint."""
    if bucket is None:
        rows = read_json_lines(directory / "metrics.jsonl")
    else:
        curves = read_json(ObjectPath.parse(bucket) / f"checkpoints/{step}/curves/metadata") or {}
        rows = [json.loads(line) for line in str(curves.get("metrics.jsonl", "")).splitlines()]
    rows = [row for row in rows if row["step"] <= step]
    return {key: value for row in rows for key, value in row.items() if key.startswith(("train/", "eval/")) and not key.endswith("time")}


def saved_steps(run: Place, known: Collection[int] = ()) -> list[int]:
    """The steps of a run's checkpoints that are whole; in a bucket those `known` to be so are not looked at again. Raises StorageError."""
    if isinstance(run, Path):
        return steps_in(run / "checkpoints")
    named = {int(place.name): place for place in objects.directories_in(run / "checkpoints") if place.name.isdigit()}
    return [step for step, place in named.items() if step in known or _is_committed(place)]


def _is_committed(checkpoint: ObjectPath) -> bool:
    try:
        objects.stat(checkpoint / COMMIT_FILE)
    except FileNotFoundError:
        return False
    return True


export_checkpoint = step_task(description="Export a checkpoint to Hugging Face format", name="export_checkpoint")(export_checkpoint_body)
