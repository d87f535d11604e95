"""Whether this installation can be a host's, without chips: `python -m deployments.tpu.smoke [--image]`, which ends the image's build.

What a host runs is loaded as a host loads it; nothing is trained. `--image` looks for what an image must not have besides.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import distributions, entry_points
from pathlib import Path

from deployments.tpu.request import CHECKOUT, startup_script

# libtpu ends a process that gives it a flag it does not know, and needs no chip to describe a slice.
DESCRIBE_SLICE = """
import os, sys
from model.preflight.topology import prepare
prepare()
os.environ["LIBTPU_INIT_ARGS"] = sys.argv[1]
from jax.experimental.topologies import get_topology_desc
from model.slices import slice_named
print(len(get_topology_desc(**slice_named("v6e-16").topology_arguments(2)).devices))
"""
COMPILERS = ("cc", "gcc", "g++", "clang", "ld", "make")


class Broken(Exception):
    """A host could not run here; the message says why."""


def trainer() -> str:
    """The trainer, with JAX, and what followers run before it."""
    names = [import_module(name).__name__ for name in ("tasks.follower", "model.training_process")]
    return f"{' and '.join(names)}, JAX {sys.modules['jax'].__version__}"


def flow() -> str:
    """The flow, found as Prefect finds it on host 0."""
    from prefect.flows import load_flow_from_entrypoint

    found = load_flow_from_entrypoint(str(CHECKOUT / "flows" / "pretrain.py") + ":pretrain", use_placeholder_flow=False)
    return f"flow {found.name}"


def worker_type() -> str:
    """The worker type, found as `prefect worker start` finds it."""
    for entry in entry_points(group="prefect.collections", name="prefect_llama_tpu"):
        return f"worker type {entry.load().TPUWorker.type}"
    raise Broken("no entry point prefect_llama_tpu: install this project itself, `pip install --no-deps -e .`")


def agent() -> str:
    """The startup script."""
    script = startup_script()
    compile(script, "startup-script", "exec")
    return f"startup script, {len(script)} characters"


def locked() -> str:
    """Every installed package is the locked one."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (CHECKOUT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    wanted = [Requirement(line.rstrip(" \\")) for line in lines if line[:1].isalnum()]
    versions = {canonicalize_name(each.name): each.specifier for each in wanted if each.marker is None or each.marker.evaluate()}
    known = {canonicalize_name(each.metadata["Name"]): each.version for each in distributions()}
    wrong = [f"{name} {known[name]}" for name in sorted(known.keys() & versions.keys()) if not versions[name].contains(known[name], True)]
    if wrong:
        raise Broken(f"not the versions of requirements.lock: {', '.join(wrong)}")
    return f"{len(known.keys() & versions.keys())} packages of requirements.lock"


def libtpu(flags: str = "") -> str:
    """The TPU's runtime, with `flags` as LIBTPU_INIT_ARGS."""
    child = subprocess.run([sys.executable, "-c", DESCRIBE_SLICE, flags], capture_output=True, text=True, timeout=300, cwd=CHECKOUT)
    if child.returncode:
        raise Broken(f"libtpu: {(child.stderr.strip().splitlines() or ['no word'])[-1]}")
    return f"libtpu describes a slice of {child.stdout.strip()} chips"


def image() -> str:
    """What an image must not have: root as its user, code that the user can change, compilers."""
    if os.getuid() == 0:
        raise Broken("the user is root: end the image with USER")
    if os.access(Path(__file__), os.W_OK) or os.access(CHECKOUT, os.W_OK):
        raise Broken(f"user {os.getuid()} can write {CHECKOUT}: copy it as root")
    found = [name for name in COMPILERS if shutil.which(name)]
    if found:
        raise Broken(f"there are compilers: {', '.join(found)}: build in a stage of its own")
    return f"user {os.getuid()}, code read-only, no compilers"


CHECKS: tuple[Callable[[], str], ...] = (trainer, flow, worker_type, agent, locked, libtpu)


def main(arguments: list[str] | None = None) -> int:
    """Checks everything, one line each; the number of checks that failed."""
    parser = argparse.ArgumentParser(prog="python -m deployments.tpu.smoke", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--image", action="store_true", help="also what an image must not have")
    checks = (*CHECKS, image) if parser.parse_args(arguments).image else CHECKS
    failed = 0
    for check in checks:
        try:
            print(f"ok       {check.__name__}: {check()}", flush=True)
        except Exception as error:
            failed += 1
            print(f"problem  {check.__name__}: {error if isinstance(error, Broken) else repr(error)}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
