"""SeqIO's offline cache as SeqIO itself makes it: `seqio_cache_tasks` on Beam's DirectRunner, in an environment of its own.

Beam holds protobuf and pyarrow below what this project's environment has, and sentencepiece 0.2.3 then fails at import; so it
gets a virtual environment in the benchmarks' cache directory, made once with pip (about 3 GB).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from corpus import Missing, cache_directory

TASK_MODULE = "seqio_text_task"
_BEAM = "2.77.0"


def environment() -> Path:
    """The Python of Beam's environment, made if it is not there. Raises Missing where pip cannot make it."""
    directory = cache_directory() / f"apache-beam-{_BEAM}-seqio-{version('seqio')}"
    python = directory / "bin" / "python"
    if not (directory / "complete").exists():
        shutil.rmtree(directory, ignore_errors=True)
        # google-crc32c: the checksum of TFRecords in C, the fastest of those that Beam can use
        wanted = [f"apache-beam=={_BEAM}", "google-crc32c", "sentencepiece>=0.2,<0.2.3"]
        wanted += [f"{package}=={version(package)}" for package in ("seqio", "tensorflow")]
        for command in ([sys.executable, "-m", "venv", str(directory)], [str(python), "-m", "pip", "install", "--quiet", *wanted]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Missing(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        (directory / "complete").touch()
    return python


def environment_is_made() -> bool:
    """Whether `environment` would only have to name it."""
    return any(cache_directory().glob(f"apache-beam-{_BEAM}-seqio-*/complete"))


def cache_command(python: Path, output: Path) -> list[str]:
    """The command that caches the benchmark's task below `output`; it takes text and model from the environment's variables."""
    script = python.with_name("seqio_cache_tasks")
    options = [f"--tasks={TASK_MODULE}", f"--module_import={TASK_MODULE}", f"--output_cache_dir={output}"]
    return [str(python), str(script), *options, "--pipeline_options=--runner=DirectRunner"]
