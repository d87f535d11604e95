"""The trainer as a child of this process: its curves kept safe, its progress shown, its outcome written down.

Both ways to train come here: the training step in its own process, and the flow that runs on host 0 of a slice.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from model.checkpoint_files import steps_in
from model.child import STOPPED
from model.curves import CURVES, curves_until, put_curves_back
from model.durable import write_json
from model.job import TrainingJob
from model.metrics import read_json_lines, read_samples
from tasks.bucket_runs import send_records
from tasks.caching import assert_still_owner, run_logger
from tasks.children import ChildStopped, run_child
from tasks.training_report import TrainingReport

OWNER_SECONDS = 5.0
CURVES_COPY = ".curves.json"
JOB_FILE = ".job.json"
OUTCOME_FILE = ".outcome.json"
RECORDS = (*CURVES, "loss.png", "loss.html", JOB_FILE, OUTCOME_FILE)  # what of a finished run others read, the outcome last


def run_trainer(job: TrainingJob) -> None:
    """Trains from the newest verified checkpoint to the last step, and leaves what a summary needs in `OUTCOME_FILE`.

    Raises:
        ChildFailed: the trainer named an error, or died.
        ChildStopped: it saved and stopped; the message says how to continue.
        OSError: the disk is full or closed.
    """
    job_file = job.directory / JOB_FILE
    write_json(job_file, job.model_dump(mode="json"))
    (job.directory / OUTCOME_FILE).unlink(missing_ok=True)
    report = TrainingReport(job)
    restore_curves(job.directory)

    checked = time.monotonic()

    def on_event(event: dict[str, Any]) -> None:
        nonlocal checked
        if time.monotonic() - checked > OWNER_SECONDS:
            # A paused machine may wake up when another one has taken over: then this trainer must stop writing.
            assert_still_owner()
            checked = time.monotonic()
        if event.get("event") == "saving":
            copy_curves(job.directory, int(event["step"]))
        report.on_event(event)

    try:
        with report:
            run_child("model.training_process", [str(job_file)], on_event, stopped_status=STOPPED, variables=job.train.env_vars)
    except ChildStopped as stopped:
        raise ChildStopped(
            f"training {job.name} was stopped {_where(job, report, stopped.saved)}: run the same command again to continue"
        ) from None
    write_json(job.directory / OUTCOME_FILE, outcome(job.directory, report))
    send_records(job, RECORDS)


def _where(job: TrainingJob, report: TrainingReport, saved: bool) -> str:
    if saved:
        return f"and saved at step {report.step} of {job.train.num_train_steps}"
    steps = steps_in(job.checkpoints)
    return f"before it could save; its newest checkpoint is of step {steps[0]}" if steps else "before it could save a first checkpoint"


def outcome(directory: Path, report: TrainingReport) -> dict[str, Any]:
    """The last values of the curves and the last samples: what a summary shows without opening the files."""
    rows = read_json_lines(directory / "metrics.jsonl")
    final: dict[str, Any] = {}
    for row in rows:
        final.update({key: value for key, value in row.items() if key.startswith(("train/", "eval/")) and not key.endswith("time")})
    return {
        "step": rows[-1]["step"] if rows else 0,
        "final": final,
        "samples": read_samples(directory / "samples.jsonl"),
        "num_parameters": report.started.get("num_parameters"),
        "skipped_rows": report.started.get("skipped_rows", 0),
        "components": report.started.get("planned", {}),
        "origin": report.started.get("origin", {}),
    }


def read_outcome(directory: Path) -> dict[str, Any] | None:
    """What `run_trainer` left when it trained to the end; None where it has not."""
    try:
        found = json.loads((directory / OUTCOME_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def copy_curves(directory: Path, step: int) -> None:
    """Keeps the rows up to `step`, which a checkpoint is about to cover: the weights can be trained again, the curve cannot."""
    curves = curves_until(directory, step)
    write_json(directory / CURVES_COPY, {"curves": curves, "sha256": _digest(curves)})


def restore_curves(directory: Path) -> None:
    """Puts the rows of the copy back into the files that do not begin with them. The trainer cuts off those after its resume step."""
    try:
        copy = json.loads((directory / CURVES_COPY).read_text(encoding="utf-8"))
        curves = {name: str(copy["curves"][name]) for name in CURVES}
        intact = copy["sha256"] == _digest(curves)
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        intact, curves = False, {}
    if not intact:
        run_logger().warning("%s is damaged, so it is not used", directory / CURVES_COPY)
        return
    for name in put_curves_back(directory, curves):
        run_logger().warning("%s lacks rows or has others than were written: restored from its copy", directory / name)


def _digest(curves: dict[str, str]) -> str:
    return hashlib.sha256("".join(curves[name] for name in CURVES).encode()).hexdigest()
