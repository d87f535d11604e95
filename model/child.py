"""What a child process owes its parent: die with it, and speak in JSON lines."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG = 1
STOPPED = 75  # exit status of a child that saved and stopped because it was asked to (EX_TEMPFAIL: try again)
PARENT_VARIABLE = "PREFECT_LLAMA_PARENT_PID"


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


def emit(event: str, **fields: Any) -> None:
    """One JSON line on standard output: `{"event": ..., ...}`."""
    print(json.dumps({"event": event, **fields}), flush=True)
