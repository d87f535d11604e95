"""Where a directory's emulator answers; it is started if there is none. The standard library only: a worker imports this."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from model.child import CHECKOUT, PARENT_VARIABLE, child_environment

ADDRESS_FILE = "emulator.json"
LOG = "emulator.log"
LOCK = "emulator.lock"  # the emulator of the directory has it as long as it lives: it cannot be there twice
_START_LOCK = "start.lock"  # one process at a time looks for the emulator and starts it
_PATIENCE = 60.0  # seconds
_LOOK_AGAIN = 0.05
_LOG_LINES = 20


def running_emulator(directory: Path, *, options: Sequence[str] = ()) -> str:
    """The address, host:port, of the Cloud TPU API that the emulator of `directory` serves.

    If none answers, one is started, in a session of its own, with its log in DIRECTORY/emulator.log; it goes on when this process ends.
    Processes that ask at the same time get the same one. options: further arguments, should it have to be started.

    Raises:
        RuntimeError: it did not come up within 60 s, with the end of its log; or this is no Linux.
    """
    if sys.platform != "linux":
        raise RuntimeError("the provider local simulates hosts with Linux's /proc: use Linux, a virtual machine or a container of it")
    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    with _only_one_asks(directory):
        started: subprocess.Popen[bytes] | None = None
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            address = _answering(directory)
            if address is not None:
                return address
            if started is None and is_free(directory):
                started = _start(directory, options)
            elif started is not None and started.poll() is not None:
                break
            time.sleep(_LOOK_AGAIN)
        if started is not None:
            started.kill()
        raise RuntimeError(f"the TPU emulator of {directory} did not come up; the end of {directory / LOG}:\n{_end_of_log(directory)}")


def is_free(directory: Path) -> bool:
    """Whether no emulator of that directory lives, not even one that starts or ends."""
    with (directory / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@contextmanager
def _only_one_asks(directory: Path) -> Iterator[None]:
    with (directory / _START_LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _answering(directory: Path) -> str | None:
    """The address in the directory's file, if the emulator that wrote it answers."""
    try:
        written: dict[str, Any] = json.loads((directory / ADDRESS_FILE).read_bytes())
        address, control, process = written["address"], written["control"], written["pid"]
    except (FileNotFoundError, ValueError, KeyError):  # there is none, or not one that an emulator wrote
        return None
    connection = HTTPConnection(control, timeout=5.0)
    try:
        connection.request("GET", "/")
        told = json.loads(connection.getresponse().read())
    except (OSError, HTTPException, ValueError):  # it is gone, and perhaps something else has its port
        return None
    finally:
        connection.close()
    if not isinstance(told, dict) or told.get("pid") != process or told.get("directory") != str(directory) or told.get("ends"):
        return None
    return address


def _start(directory: Path, options: Sequence[str]) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in child_environment().items() if name != PARENT_VARIABLE}
    with (directory / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "deployments.tpu.emulator", "--directory", str(directory), *options],
            env=environment,
            cwd=CHECKOUT,  # this process's own may be removed before the emulator ends
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _end_of_log(directory: Path) -> str:
    try:
        lines = (directory / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return "(there is none)"
    return "\n".join(lines[-_LOG_LINES:])
