"""What a child process owes its parent: die with it, and speak in JSON lines."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies, so that no orphan goes on writing.

    Elsewhere the parent's own clean-up has to do. The parent may have died before the request: then exit now.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or parent == 1:
        raise SystemExit("the parent process is gone")


def emit(event: str, **fields: Any) -> None:
    """One JSON line on standard output: `{"event": ..., ...}`."""
    print(json.dumps({"event": event, **fields}), flush=True)
