"""One boot of a host: the startup script as a process, told what to run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from deployments.tpu.request import startup_script


def launch(command: str, **changed: Any) -> dict[str, Any]:
    told = {
        "leader": [sys.executable, "-c", "raise SystemExit('this host is no leader')"],
        "follower": [sys.executable, "-c", command, "{job}"],
        "follower_job": {"name": "a job"},
        "env": {"OWN": "value"},
        "secrets": {},
        "coordinator_port": 8476,
        "directory": str(Path.cwd()),
    }
    return {**told, **changed}


def boot(place: Path, *, replaced: tuple[str, str] = ("", ""), **environment: str) -> subprocess.Popen[str]:
    """Runs the startup script as a host does: an executable file, where nothing of this project can be imported."""
    script = place / "startup-script"
    assert replaced[0] in startup_script()
    script.write_text(startup_script().replace(*replaced), encoding="utf-8")
    script.chmod(0o700)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"TMPDIR": str(place)} | environment
    return subprocess.Popen([str(script)], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=place)
