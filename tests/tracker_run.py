"""A run that only logs, for tests that kill it: `python -m tests.tracker_run DIRECTORY FIRST LAST UNSURE TRACKER...`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from model.metrics import MetricsLog
from model.tracker_services import Wandb
from model.trackers import open_trackers

# W&B's file is written every half second for this, so that no test waits for its 15 s.
os.environ["WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL"] = "0.5"
Wandb.settle_seconds = 3.0


def main(directory: Path, first: int, last: int, unsure: int, names: list[Any]) -> None:
    """Logs the steps from `first` to `last`, going on after `first - 1`, and ends.

    unsure above 0: waits until `last` is noted as delivered, logs so many steps more, and dies by SIGKILL.
    """
    trackers = open_trackers(tuple(names), directory, run_id="0123456789abcdef", name="run", tags=(), config={"x": 1}, tell=print)
    log = MetricsLog(directory / "metrics.jsonl", first - 1, trackers)
    for step in range(first, last + 1):
        log.log(step, {"train/loss": float(step), "not/finite": float("nan")})
    if not unsure:
        log.close()
        return
    while not _noted(directory / "trackers.json", last, names):
        log.sync()
        time.sleep(0.05)
    for step in range(last + 1, last + unsure + 1):
        log.log(step, {"train/loss": float(step), "not/finite": float("nan")})
    log.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def _noted(path: Path, step: int, names: list[str]) -> bool:
    record = json.loads(path.read_text()) if path.exists() else {}
    return all(record.get(name, {"step": 0})["step"] >= step for name in names)


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[2:5]]
    main(Path(sys.argv[1]), numbers[0], numbers[1], numbers[2], sys.argv[5:])
