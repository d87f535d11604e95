"""`python -m deployments.tpu.emulator --directory DIR`: serves the Cloud TPU API on loopback until SIGTERM, or until nobody needs it.

DIR/emulator.json tells where, once it answers: `{"address", "control", "pid"}`.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from deployments.tpu.emulator.address import ADDRESS_FILE, LOCK
from deployments.tpu.emulator.cloud import Cloud
from deployments.tpu.emulator.control import Control
from deployments.tpu.emulator.fulfilment import Supply
from deployments.tpu.emulator.host import DISKS
from deployments.tpu.emulator.service import Service
from model.durable import write_json

_LOG = logging.getLogger(__name__)
_LOOK_AGAIN = 0.2  # seconds
_LOCK_PATIENCE = 1.0


def main() -> None:
    """Serves, and ends with its hosts."""
    asked = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    directory: Path = asked.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("a") as lock:
        if not _taken(lock):
            raise SystemExit(f"another emulator has --directory {directory}: give another directory, or end that one")
        # A dead emulator's: nobody may take its address for this one's.
        (directory / ADDRESS_FILE).unlink(missing_ok=True)
        if (directory / DISKS).exists():
            shutil.rmtree(directory / DISKS)
        _serve(directory, asked)


def _taken(lock: TextIO) -> bool:
    """Takes the lock, unless another emulator has it: that keeps it, while those that only ask whether it is free do not."""
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOCK_PATIENCE / 20)
        else:
            return True


def _serve(directory: Path, asked: argparse.Namespace) -> None:
    supply = Supply(asked.capacity, queue_seconds=asked.queue_seconds, provision_seconds=asked.provision_seconds)
    cloud = Cloud(directory, supply, grace_seconds=asked.grace_seconds)
    service = Service(cloud)
    ends = threading.Event()
    deciding = threading.Lock()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ends.set())

    def about() -> dict[str, Any]:
        with deciding:  # whoever is told that it does not end has the idle time to make a request
            service.touch()
            return {"pid": os.getpid(), "directory": str(directory), "ends": ends.is_set()}

    address = service.start(asked.port)
    control = Control(cloud, about)
    write_json(directory / ADDRESS_FILE, {"address": address, "control": control.address, "pid": os.getpid()})
    _LOG.info("Cloud TPU API on %s, control on %s, process %d", address, control.address, os.getpid())
    while not ends.wait(_LOOK_AGAIN):
        with deciding:
            if service.is_idle(asked.idle_seconds):
                _LOG.info("no queued resource, and no request for %g s", asked.idle_seconds)
                ends.set()
    (directory / ADDRESS_FILE).unlink(missing_ok=True)
    service.stop()
    cloud.close(asked.grace_seconds)
    control.close()
    _LOG.info("ended")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deployments.tpu.emulator", description="An emulator of the Cloud TPU API on loopback.")
    parser.add_argument("--directory", type=Path, required=True, help="logs and disks of the hosts, and emulator.json with the addresses")
    parser.add_argument("--port", type=int, default=0, help="of the API; 0: a free one")
    parser.add_argument("--idle-seconds", type=float, default=600.0, help="it ends when it has had nothing to do for so long")
    parser.add_argument("--capacity", type=int, default=None, help="slices of each zone; no bound if left out")
    parser.add_argument("--queue-seconds", type=float, default=0.0, help="how long a request is ACCEPTED, at least")
    parser.add_argument("--provision-seconds", type=float, default=0.0, help="how long it is PROVISIONING, at least")
    parser.add_argument("--grace-seconds", type=float, default=20.0, help="between SIGTERM and SIGKILL for hosts that are deleted")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
