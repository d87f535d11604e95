"""The trainer on a host that is not the first of its slice: `python -m tasks.follower JOB.json`.

Brings what the job reads from a bucket onto this machine, then becomes the trainer. Needs no Prefect.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from model.child import emit_error
from model.durable import write_json
from model.job import TrainingJob
from tasks.bucket_runs import on_this_machine


def main(job_file: Path) -> int:
    """Becomes the trainer of the job in the file; returns an exit status only where that is not to be."""
    try:
        job = on_this_machine(TrainingJob.model_validate_json(job_file.read_text(encoding="utf-8")))
        write_json(job_file, job.model_dump(mode="json"))
    except (ValueError, OSError) as error:
        emit_error(error)
        return 1
    command = [sys.executable, "-m", "model.training_process", str(job_file)]
    os.execve(sys.executable, command, {**os.environ, **job.train.env_vars})  # noqa: S606


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tasks.follower JOB.json")
    sys.exit(main(Path(sys.argv[1])))
