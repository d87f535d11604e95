"""Prefect's temporary server for a run without a server of one's own: Ctrl-C does not reach it, and it ends with the run.

Prefect starts it in the terminal's process group, where Ctrl-C takes it away while the flow still saves, and leaves it behind when
the flow is killed. Here it has a session of its own, and goes when its standard input, which the flow holds, is closed.
`python -m flows.temporary_server PORT` is the server process.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

MOST_STARTS = 4


def use_temporary_server() -> None:
    """Makes Prefect use this server wherever it would start its own; does nothing where a server is configured."""
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, PREFECT_SERVER_EPHEMERAL_ENABLED, get_current_settings

    class TemporaryServer(SubprocessASGIServer):
        starts = 0

        def start(self, timeout: int | None = None) -> None:
            # Two servers that make the same new database at the same moment break each other's migrations.
            place = PREFECT_HOME.value()
            place.mkdir(parents=True, exist_ok=True)
            with (place / ".temporary-server.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                super().start(timeout)

        def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
            self.starts += 1
            if self.starts > MOST_STARTS:  # Prefect starts one that ended with status 3 again, for ever
                raise RuntimeError(
                    f"Prefect's temporary server ended {MOST_STARTS} times while starting, see temporary-server.log there: "
                    f"move its database in {PREFECT_HOME.value()} away, or set PREFECT_HOME to another directory"
                )
            checkout = str(Path(__file__).resolve().parent.parent)
            environment = {
                **os.environ,
                "PREFECT_UI_ENABLED": "0",
                "PREFECT__SERVER_EPHEMERAL": "1",
                "PREFECT__SERVER_FINAL": "1",
                **get_current_settings().to_environment_variables(exclude_unset=True),
                "PYTHONPATH": os.pathsep.join([checkout, *filter(None, [os.environ.get("PYTHONPATH")])]),
            }
            command = [sys.executable, "-m", "flows.temporary_server", str(self.port)]
            # what it says while it ends, of writes that nobody waits for, is not for the terminal
            with (PREFECT_HOME.value() / "temporary-server.log").open("ab") as log:
                return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=log, start_new_session=True)

    if not PREFECT_API_URL.value() and PREFECT_SERVER_EPHEMERAL_ENABLED.value():
        TemporaryServer()  # Prefect keeps one instance for each port, and asks for that of no particular port


def serve(port: int) -> None:
    """Serves until the parent closes our standard input, which its death does too. Exit status 3: the port is taken."""
    import uvicorn

    def end_with_parent() -> None:
        os.read(0, 1)  # not through sys.stdin, whose lock would be held when the interpreter ends
        os._exit(0)  # nobody is left to serve; every write was a transaction of the database

    threading.Thread(target=end_with_parent, daemon=True).start()
    uvicorn.run("prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=port, log_level="error", lifespan="on")


if __name__ == "__main__":
    serve(int(sys.argv[1]))
