"""Virtual environments for peers that cannot live in this project's: made once with pip, kept in the benchmarks' cache directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corpus import Missing, cache_directory
from measure import run_process

_PYTHON = "3.12"  # the only one that MaxText 0.2.5 runs on; Levanter does too

MAXTEXT = ("maxtext-0.2.5", ("maxtext[tpu]==0.2.5",))
# `levanter` on PyPI stopped in 2023. GitPython: its trackers need it and its metadata does not say so.
LEVANTER = ("levanter-0.2.20.dev202606180959", ("marin-levanter==0.2.20.dev202606180959", "GitPython"))


def environment(name: str, requirements: Sequence[str]) -> Path:
    """The Python of an environment with `requirements`, made if it is not there.

    Raises:
        Missing: there is no Python 3.12, or pip cannot install the packages.
    """
    directory = cache_directory() / name
    python = directory / "bin" / "python"
    if not (directory / "complete").exists():
        shutil.rmtree(directory, ignore_errors=True)
        for command in ([_interpreter(), "-m", "venv", str(directory)], [str(python), "-m", "pip", "install", "--quiet", *requirements]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Missing(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        (directory / "complete").touch()
    return python


def is_made(name: str) -> bool:
    """Whether `environment` would only have to name it."""
    return (cache_directory() / name / "complete").exists()


def run_child(python: Path | str, script: str, spec: dict[str, Any], **variables: str) -> dict[str, Any]:
    """Runs `script` as a side by another interpreter; what it prints as JSON on its last line."""
    return json.loads(run_process([str(python), script, "--child", json.dumps(spec)], **variables).splitlines()[-1])


def _interpreter() -> str:
    if f"{sys.version_info.major}.{sys.version_info.minor}" == _PYTHON:
        return sys.executable
    # Before PATH: pyenv's shims are there for versions that it is not told to run.
    if pyenv := sorted(Path.home().glob(f".pyenv/versions/{_PYTHON}.*/bin/python")):
        return str(pyenv[-1])
    if found := shutil.which(f"python{_PYTHON}"):
        return found
    raise Missing(f"python{_PYTHON} is neither on PATH nor in ~/.pyenv/versions")
