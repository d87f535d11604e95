"""Child processes of a step: heavy imports, crashes and signals stay in them, their JSON lines come back.

A step's body calls `run_child`; the flow calls `stop_children` when it is told to stop, and every child gets the time
it needs to save.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import IO, Any

from model.child import HUNG, child_environment, events
from model.secret_text import without_secrets
from tasks.storage import FULL, REFUSED

SAVE_SECONDS = 25.0  # what a preempted Cloud TPU VM grants, less some

_running: set[subprocess.Popen[str]] = set()
_lock = threading.Lock()
_stopping = threading.Event()


class ChildFailed(RuntimeError):
    """The child named an error, or died; the message is complete."""

    def __init__(self, message: str, *, named: bool = False) -> None:
        """`named`: by the child itself, which foresaw it."""
        super().__init__(message)
        self.named = named


class ChildStopped(RuntimeError):
    """The child stopped because it was asked to."""

    def __init__(self, message: str, *, saved: bool = False) -> None:
        """`saved`: it said so itself, by its exit status; else it ended, or was killed, without."""
        super().__init__(message)
        self.saved = saved


def run_child(
    module: str,
    arguments: list[str],
    on_event: Callable[[dict[str, Any]], None],
    *,
    stopped_status: int | None = None,
    on_start: Callable[[IO[str]], None] | None = None,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Runs `python -m module arguments` and passes each JSON object it prints to `on_event`. `variables` are added to its environment.

    on_start: takes the child's standard input, for a child that is told more while it runs.

    Raises:
        ChildFailed: with the message of its `{"event": "error"}` line, or its last words on standard error; also where it hung
            and ended itself.
        ChildStopped: it ended with `stopped_status`, or was stopped by `stop_children`.
        OSError: what the child named was the disk, full or closed to it.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        # A session of its own: Ctrl-C in the terminal reaches the flow alone, which then asks the child once.
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=None if on_start is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**child_environment(), **(variables or {})},
            start_new_session=True,
        )
        with _lock:
            _running.add(process)
        try:
            if _stopping.is_set():
                process.send_signal(signal.SIGTERM)
            if on_start is not None and process.stdin is not None:
                on_start(process.stdin)
            error = _follow(process, on_event)
        except BaseException:
            _stop(process)
            raise
        finally:
            with _lock:
                _running.discard(process)
        if process.returncode == 0:
            return
        if process.returncode == stopped_status or (_stopping.is_set() and error is None and process.returncode != HUNG):
            raise ChildStopped(f"{module} was stopped", saved=process.returncode == stopped_status)
        if error is None:
            raise ChildFailed(without_secrets(_last_words(module, process.returncode, stderr)))
        if error.get("errno") in FULL | REFUSED:
            raise OSError(error["errno"], error["message"])
        raise ChildFailed(without_secrets(error["message"]), named=error.get("foreseen", True))


def _follow(process: subprocess.Popen[str], on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
    """Reads the child's lines until it ends; its error event, if it sent one."""
    error: dict[str, Any] | None = None
    assert process.stdout is not None
    for event in events(process.stdout):
        if event.get("event") == "error":
            error = event
        on_event(event)
    process.wait()
    return error


def _last_words(module: str, status: int, stderr: Any) -> str:
    stderr.seek(0)
    tail = "".join(stderr.readlines()[-25:]).strip()
    if status == -signal.SIGKILL:
        return f"{module} was killed by the system, most often for using too much memory: use a smaller model, batch or sequence. {tail}"
    if status == HUNG:
        return f"{module} hung and ended itself; what its threads were doing: {tail}"
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return f"{module} ended with {how}: {tail or 'it printed no error'}"


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=SAVE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def stopping() -> bool:
    """Whether `stop_children` was called: long work in threads looks here between two pieces."""
    return _stopping.is_set()


def stop_children() -> None:
    """Asks every running child to save and stop; those started from now on are stopped at once.

    Returns at once. A child that is still there after `SAVE_SECONDS` is killed: whoever waits for it must not wait for ever.
    """
    _stopping.set()
    with _lock:
        children = [process for process in _running if process.poll() is None]
    for process in children:
        process.send_signal(signal.SIGTERM)
    if children:
        last_resort = threading.Timer(SAVE_SECONDS, lambda: [process.kill() for process in children if process.poll() is None])
        last_resort.daemon = True
        last_resort.start()


def allow_children() -> None:
    """Ends the effect of `stop_children`, for the next run in this process."""
    _stopping.clear()
