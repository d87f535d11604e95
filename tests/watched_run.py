"""A process that beats and then hangs, or is stopped and goes on: `python -m tests.watched_run DIRECTORY SECONDS WHAT`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from model.child import HUNG
from model.watchdog import Watchdog


def hang_here() -> None:
    """Never returns."""
    threading.Event().wait()


def main(directory: Path, seconds: float, what: str) -> None:
    """Hangs in step 8, or in an evaluation after step 7; or sleeps through a stop that is longer than the limit, and ends well."""
    if what == "mute":  # as where standard output is what hangs
        print("Thread 1 in hang_here", file=sys.stderr, flush=True)
        os._exit(HUNG)
    watchdog = Watchdog(directory, minutes=seconds / 60)
    watchdog.beat(7)
    if what == "step":
        hang_here()
    if what == "evaluation":
        with watchdog.longer("the evaluation"):
            hang_here()
    wake = f"sleep {2 * seconds}; kill -CONT {os.getpid()}"
    with subprocess.Popen(["/bin/sh", "-c", wake], start_new_session=True):
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(seconds / 3)  # the watchdog looks several times before the next beat
        watchdog.beat(8)
    watchdog.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
