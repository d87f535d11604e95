"""Rows for the trackers of a run that has ended: `python -m model.track_rows JOB.json` sends them, and says which trackers took them.

A tracker's run has one writer at a time, so numbers that are found beside the training, those of lm-eval, come after it: W&B's run is
resumed by its id, TensorBoard gets another event file. Rows of the training that a tracker lacks go first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from model.child import die_with_parent, emit, exit_status
from model.config_base import Config
from model.job import TrainingJob
from model.metrics import read_json_lines
from model.trackers import TrackerName, TrackerThread, close_trackers, open_trackers

DELIVERIES = "trackers.json"


class RowsJob(Config):
    """What to send: `rows` are those of `evals.jsonl`."""

    training: TrainingJob
    rows: tuple[dict[str, Any], ...]


def send(job: RowsJob) -> list[str]:
    """Sends the rows to every tracker of the run; the names of those that have them all."""
    training = job.training
    directory, followed = training.directory, (training.directory / DELIVERIES).is_file()
    names: list[TrackerName] = list(training.track)
    if "wandb" in names and not followed and not os.environ.get("WANDB_API_KEY"):
        # an offline run of its own would number its rows from 0, and W&B drops those when both are synced
        tell("wandb: the run's files are on the host that trained it: set WANDB_API_KEY here too, to send it the numbers of lm-eval")
        names.remove("wandb")
    trackers = open_trackers(
        tuple(names),
        directory,
        run_id=training.fingerprint[:16],
        name=training.name,
        tags=training.tags,
        config=training.model_dump(mode="json"),
        tell=tell,
    )
    trained = read_json_lines(directory / "metrics.jsonl") if followed else []
    for tracker in trackers:
        tracker.begin(trained, training.train.num_train_steps)
        for row in job.rows:
            tracker.log(row["step"], {key: value for key, value in row.items() if key != "step"})
    close_trackers(trackers)
    return [tracker.name for tracker in trackers if isinstance(tracker, TrackerThread) and tracker.delivered]


def tell(message: str) -> None:
    """A message for the log of the run."""
    emit("message", text=message)


def main(arguments: list[str]) -> int:
    """Sends one job's rows; returns the exit status."""
    die_with_parent()
    job = RowsJob.model_validate_json(Path(arguments[0]).read_text(encoding="utf-8"))
    return exit_status(lambda: emit("sent", trackers=send(job)))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m model.track_rows JOB.json")
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # the library of a tracker that was given up would wait at exit for what does not answer
