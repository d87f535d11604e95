"""The processes of one simulated machine: found in /proc, and ended together."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

MARK = "PREFECT_LLAMA_EMULATED_HOST"  # environment variable: which simulated machine a process is part of
_PROC = Path("/proc")
_LOOK_AGAIN, _LOOK_SELDOM = 0.02, 0.25  # seconds; a look costs time that processes need that save what they have
_UNKILLABLE = 30.0  # seconds after SIGKILL


def processes_of(mark: str, root: int) -> set[int]:
    """Ids of the processes whose environment has `mark`, and of the descendants of process `root`; without `root` itself and zombies.

    The mark is inherited and stays when a parent dies; descent also finds a process that was given another environment.
    """
    wanted = f"{MARK}={mark}".encode()
    found: set[int] = set()
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The name, in parentheses, may have spaces: what follows it does not.
            state, parent = (entry / "stat").read_bytes().rpartition(b")")[2].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if state in (b"Z", b"X"):
            continue
        process = int(entry.name)
        children.setdefault(int(parent), []).append(process)
        if wanted in _environment(entry):
            found.add(process)
    todo = [root]
    while todo:
        below = children.pop(todo.pop(), [])
        found.update(below)
        todo += below
    return found - {root}


def end_processes(mark: str, root: int, grace: float) -> None:
    """SIGTERM to all of them, and SIGKILL to those left after `grace` seconds; grace 0 is a power cut. Returns when none is left.

    Raises:
        RuntimeError: some cannot be killed.
    """
    if grace > 0:
        _send(processes_of(mark, root), signal.SIGTERM)
        deadline = time.monotonic() + grace
        pause = _LOOK_AGAIN
        while processes_of(mark, root) and time.monotonic() < deadline:
            time.sleep(min(pause, max(deadline - time.monotonic(), 0.0)))
            pause = min(1.5 * pause, _LOOK_SELDOM)
    deadline = time.monotonic() + _UNKILLABLE
    while left := processes_of(mark, root):
        _send(left, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {sorted(left)} of a simulated machine are still there {_UNKILLABLE:.0f} s after SIGKILL")
        time.sleep(_LOOK_AGAIN)


def _environment(entry: Path) -> list[bytes]:
    try:
        return (entry / "environ").read_bytes().split(b"\0")
    except OSError:  # it ended meanwhile, or is another user's
        return []


def _send(processes: set[int], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)
