"""What can be wrong with a machine before a run, looked at one by one: `python flows/train.py doctor`."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from importlib import metadata

from packaging.specifiers import SpecifierSet

from tasks.artifacts import check_writable
from tasks.datasets import check_sources, shakespeare_mixture
from tasks.findings import Finding
from tasks.formatting import size
from tasks.places import Place, working_directory
from tasks.planning import usable_cores

GOOD_DISK_BYTES = 2 << 30
GOOD_MEMORY_BYTES = 2 << 30
# Versions outside these are known to fail at import or at start.
RANGES = {
    "prefect": ">=3.8.8,<3.10",
    "fastapi": ">=0.139,<0.151",
    "protobuf": ">=7.36.1",
    "jax": ">=0.10.2",
    "orbax-checkpoint": ">=0.12.8",
}
MODULES = (
    "prefect",
    "prefect_gcp",
    "jax",
    "flax",
    "optax",
    "seqio",
    "tensorflow_datasets",
    "orbax.checkpoint",
    "wandb",
    "sentencepiece",
    "safetensors",
)


def examine(root: Place) -> list[Finding]:
    """Everything that a run on this machine with artifacts below `root` depends on."""
    return [_python(), *_versions(), *_modules(), _place(root), _disk(root), _memory(), _cores(), _temporary(), _api(), _data()]


def _python() -> Finding:
    version = platform.python_version()
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Finding("python", "ok" if good else "fail", version, "" if good else "use Python 3.11, 3.12 or 3.13")


def _versions() -> list[Finding]:
    findings = []
    for package, allowed in RANGES.items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            findings.append(Finding(package, "fail", "not installed", "run `make setup`"))
            continue
        good = version in SpecifierSet(allowed)
        findings.append(Finding(package, "ok" if good else "fail", version, "" if good else f"needs {allowed}: run `make setup`"))
    return findings


def _modules() -> list[Finding]:
    missing = [name for name in MODULES if importlib.util.find_spec(name.partition(".")[0]) is None]
    if missing:
        return [Finding("packages", "fail", f"cannot find {', '.join(missing)}", "run `make setup`")]
    return [Finding("packages", "ok", f"{len(MODULES)} found")]


def _place(root: Place) -> Finding:
    try:
        check_writable(root)
    except (OSError, ValueError) as error:
        return Finding("root", "fail", str(error), "give another --root, or set PREFECT_LLAMA_ROOT")
    return Finding("root", "ok", f"{root} can be written")


def _disk(root: Place) -> Finding:
    here = working_directory(root)
    existing = next(path for path in (here, *here.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    good = free >= GOOD_DISK_BYTES
    return Finding(
        "disk", "ok" if good else "warn", f"{size(free)} free at {existing}", "" if good else "free some space or give another --root"
    )


def _memory() -> Finding:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return Finding("memory", "warn", "cannot be told on this system")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    good = total >= GOOD_MEMORY_BYTES
    return Finding("memory", "ok" if good else "warn", size(total), "" if good else "the debug preset needs 2 GiB")


def _cores() -> Finding:
    return Finding("cores", "ok", str(usable_cores()))


def _temporary() -> Finding:
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"x")
    except OSError as error:
        return Finding("temporary files", "fail", str(error), "set TMPDIR to a directory that can be written")
    return Finding("temporary files", "ok", tempfile.gettempdir())


def _api() -> Finding:
    """Where Prefect keeps its records, and whether it answers."""
    import httpx
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if not url:
        return Finding("prefect api", "ok", "none set: every run starts a temporary one of its own")
    try:
        httpx.get(f"{url.rstrip('/')}/health", timeout=5).raise_for_status()
    except httpx.HTTPError as error:
        remedy = "start it (`prefect server start`), or unset it: `prefect config unset PREFECT_API_URL`"
        return Finding("prefect api", "fail", f"{url} does not answer ({error})", remedy)
    return Finding("prefect api", "ok", f"{url} answers")


def _data() -> Finding:
    try:
        check_sources(shakespeare_mixture())
    except (OSError, ValueError) as error:
        return Finding("packaged text", "fail", str(error), "install the project again")
    return Finding("packaged text", "ok", "there")
