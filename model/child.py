"""What a child process and its parent owe each other: the same code, an end together, and JSON lines."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
STOPPED = 75  # exit status of a child that saved and stopped because it was asked to (EX_TEMPFAIL: try again)
HUNG = 76  # exit status of a child that ended itself because a step did not return (`model.watchdog`)
PARENT_VARIABLE = "PREFECT_LLAMA_PARENT_PID"
CHECKOUT = Path(__file__).resolve().parent.parent


def child_environment() -> dict[str, str]:
    """This process's environment for a child: it imports the same code, modules beside an experiment's file too, and knows its parent."""
    path = os.pathsep.join(dict.fromkeys([str(CHECKOUT), *filter(None, sys.path)]))
    return {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, PARENT_VARIABLE: str(os.getpid())}


def events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects among a child's lines; anything else a library printed."""
    for line in lines:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict):
            yield event


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies, so that no orphan goes on writing.

    Elsewhere the parent's own clean-up has to do. The parent may have died before the request: then exit now. It gives its
    process id in the environment, since a child that was already adopted by another process cannot tell.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is not None and os.getppid() != int(parent):
        raise SystemExit("the parent process is gone")


def exit_status(work: Callable[[], None]) -> int:
    """Does `work` and returns 0; after an error 1. One that explains itself is named in an event, any other leaves its traceback."""
    try:
        work()
    except (ValueError, OSError) as error:
        emit_error(error)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def emit(event: str, **fields: Any) -> None:
    """One JSON line on standard output: `{"event": ..., ...}`. Any thread may call it."""
    # One write: print() makes two, between which another thread's line could come.
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def emit_error(error: BaseException, *, foreseen: bool = True) -> None:
    """The line that names the error this process ends with, and its number where the operating system refused something.

    foreseen: it explains itself, and the same request would meet it again; anything else is a crash, which may not come again.
    TensorStore, which writes checkpoints, has the number of the system in its text alone.
    """
    number, message = None, str(error)
    if isinstance(error, OSError) and error.strerror:
        number, message = error.errno, ": ".join(filter(None, (error.strerror, error.filename and str(error.filename))))
    elif os.strerror(errno.ENOSPC) in message:
        number = errno.ENOSPC
    emit("error", message=message, type=type(error).__name__, errno=number, foreseen=foreseen)
