"""The process that stands for one simulated machine: `python -m deployments.tpu.emulator.machine`.

Its standard input is one line of JSON, `{"script", "directory", "environment"}`, and then nothing until it is closed: by the emulator,
or by the kernel when the emulator dies. Then all processes of the machine die. It adopts orphans, so that none can leave its tree.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from deployments.tpu.emulator.processes import MARK, end_processes
from model.child import PR_SET_PDEATHSIG

_PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """Runs the startup script, and ends everything once standard input is closed."""
    order = json.loads(sys.stdin.buffer.readline())
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    started = _start(libc, order) if order["script"] else None
    signal.signal(signal.SIGCHLD, _reap)
    _reap()
    sys.stdin.buffer.read()
    end_processes(order["environment"][MARK], os.getpid(), grace=0.0)
    del started  # kept until here: its destructor would ask for an exit status that _reap took


def _start(libc: ctypes.CDLL, order: dict[str, Any]) -> subprocess.Popen[bytes] | None:
    """The startup script, written to a file and executed as one: its first line says what runs it, as on a real machine."""
    script = Path(order["directory"]) / "startup-script"
    script.write_text(order["script"], encoding="utf-8")
    script.chmod(0o700)
    machine = os.getpid()

    def die_with_the_machine() -> None:  # this process has one thread: nothing can be locked in the child
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != machine:
            os._exit(1)

    try:
        return subprocess.Popen(
            [str(script)],
            env=order["environment"],
            cwd=order["directory"],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_the_machine,
        )
    except OSError as error:  # the machine is up all the same
        print(f"the startup script cannot be executed: {error}; does its first line name its interpreter?", file=sys.stderr, flush=True)
        return None


def _reap(*_: object) -> None:
    """Takes the exit status of all children that ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


if __name__ == "__main__":
    main()
