"""Prefect's temporary server for a run without a server of one's own: Ctrl-C does not reach it, and it ends with the run.

Prefect starts it in the terminal's process group, where Ctrl-C takes it away while the flow still saves, and leaves it behind when
the flow is killed. Here it has a session of its own, and goes when its standard input, which the flow holds, is closed.
`python -m flows.temporary_server PORT` is the server process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any


def use_temporary_server() -> None:
    """Makes Prefect use this server wherever it would start its own; does nothing where a server is configured."""
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_ENABLED, get_current_settings

    class TemporaryServer(SubprocessASGIServer):
        def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
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
            return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)

    if not PREFECT_API_URL.value() and PREFECT_SERVER_EPHEMERAL_ENABLED.value():
        TemporaryServer()  # Prefect keeps one instance for each port, and asks for that of no particular port


def serve(port: int) -> None:
    """Serves until the parent closes our standard input, which its death does too. Exit status 3: the port is taken."""
    import uvicorn

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(0)  # nobody is left to serve; every write was a transaction of the database

    threading.Thread(target=end_with_parent, daemon=True).start()
    uvicorn.run("prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=port, log_level="error", lifespan="on")


if __name__ == "__main__":
    serve(int(sys.argv[1]))
